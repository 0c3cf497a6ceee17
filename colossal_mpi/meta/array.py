"""Arrays that have a shape, a dtype and strides, and no memory: a program that runs on them is a dry run.

The array library of meta grids (`Grid.meta`), whose other ranks do not exist. Views and copies are NumPy's, since
they are taken of a NumPy array that is never read; of values there are none: what is asked for a number says 0. `tally`
adds up what the arrays would take, at any time and at most, and the flop of their products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace
from numpy.lib.stride_tricks import as_strided

from colossal_mpi.meta.machine import Clock

_NUMPY = array_namespace(np.empty(0))
_UNREAD = {n: np.zeros(1, f"u{n}") for n in (1, 2, 4, 8)} | {16: np.zeros(1, "c16")}


@dataclass
class Tally:
    """Bytes of the arrays that are alive and that were made since the tally began, and most of them; flop (2 m n k)."""

    now: int = 0
    peak: int = 0
    flops: int = 0
    clock: Clock | None = None


_open: list[Tally] = []


@contextmanager
def tally(clock: Clock | None = None) -> Iterator[Tally]:
    """Count arrays and products until the block ends, and let a clock run by what they would take."""
    mine = Tally(clock=clock)
    _open.append(mine)
    try:
        yield mine
    finally:
        _open.remove(mine)


def work(flops: int, *touched: Any) -> None:
    """Enter an operation that reads or writes some arrays, and its flop if it is a product, into the open tallies."""
    for one in _open:
        one.flops += flops
        if one.clock is not None:
            one.clock.compute(flops, sum([x.nbytes for x in touched if type(x) is MetaArray]))


class Memory:
    """What an array and its views would take."""

    __slots__ = ("nbytes", "tallies")

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.tallies = nbytes, tuple(_open)
        for one in self.tallies:
            one.now += nbytes
            if one.now > one.peak:
                one.peak = one.now

    def __del__(self) -> None:
        for one in self.tallies:
            one.now -= self.nbytes


class MetaArray:
    """An array without memory."""

    __slots__ = ("_unread", "dtype", "memory", "nbytes", "ndim", "shape", "size")
    __array_ufunc__ = None
    namespace: ClassVar[ModuleType]
    """The functions of these arrays: `colossal_mpi.meta.namespace`, which sets it."""

    def __init__(self, unread: np.ndarray, dtype: np.dtype, memory: Memory) -> None:
        self._unread, self.dtype, self.memory = unread, dtype, memory
        self.shape, self.ndim, self.size = unread.shape, unread.ndim, unread.size
        self.nbytes = self.size * dtype.itemsize

    @property
    def flags(self) -> Any:
        """How it lies in memory, as NumPy says it."""
        return self._unread.flags

    def __array_namespace__(self, **_: Any) -> Any:

        return type(self).namespace

    def _view(self, unread: np.ndarray) -> MetaArray:
        return MetaArray(unread, self.dtype, self.memory)

    def reshape(self, shape: int | Sequence[int], copy: bool | None = None) -> MetaArray:
        """Return the array in another shape; a view where NumPy has one."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        try:
            return self._view(_NUMPY.reshape(self._unread, shape, copy=False))
        except (AttributeError, ValueError):
            known = -math.prod(shape) if -1 in shape else 0
            whole = tuple(self.size // known if n == -1 and known else n for n in shape)
            if copy is False or math.prod(whole) != self.size:
                raise
            return made(whole, self.dtype, self)

    def transpose(self, order: Sequence[int]) -> MetaArray:
        """Return a view with the dims in another order."""
        return self._view(self._unread.transpose(order))

    @property
    def T(self) -> MetaArray:  # noqa: N802
        """The array with its dims reversed, as a view."""
        return self.transpose(tuple(reversed(range(self.ndim))))

    def broadcast(self, shape: Sequence[int]) -> MetaArray:
        """Return a view of a larger shape."""
        return self._view(np.broadcast_to(self._unread, tuple(shape)))

    def copy(self, order: str = "C") -> MetaArray:
        """Return a copy in C order."""
        return made(self.shape, self.dtype, self)

    def view(self, dtype: Any) -> MetaArray:
        """Return the same memory in a dtype of the same size."""
        return MetaArray(self._unread, np.dtype(dtype), self.memory)

    def __getitem__(self, index: Any) -> MetaArray:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, MetaArray) for part in parts):
            return empty((0,), self.dtype)  # a mask chooses elements, of which there are none
        whole = parts if any(part is Ellipsis for part in parts) else (*parts, ...)
        return self._view(self._unread[whole])  # with the ellipsis it is a view, never an element

    def __setitem__(self, index: Any, value: Any) -> None:
        work(0, value, value if isinstance(value, MetaArray) else self)

    def __iter__(self) -> Iterator[MetaArray]:
        return (self[i] for i in range(self.shape[0]))

    def item(self) -> int:
        """Return the number that it has not."""
        return 0

    def __bool__(self) -> bool:
        return False

    def __int__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0

    def __index__(self) -> int:
        return 0

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("an array of a meta grid has no values")

    __hash__ = None  # type: ignore[assignment]


def empty(shape: Sequence[int], dtype: Any) -> MetaArray:
    """Return an array in C order."""
    kind = dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)
    unread = _unread(tuple(shape), kind.itemsize)
    return MetaArray(unread, kind, Memory(unread.size * kind.itemsize))


def made(shape: Sequence[int], dtype: Any, *read: Any) -> MetaArray:
    """Return the array that an operation makes of others."""
    result = empty(shape, dtype)
    work(0, result, *read)
    return result


@lru_cache(maxsize=4096)
def _unread(shape: tuple[int, ...], itemsize: int) -> np.ndarray:
    """Return an array of any size in C order that must not be read: it has the memory of one element."""
    strides, step = [0] * len(shape), itemsize
    for d in reversed(range(len(shape))):
        strides[d], step = step, step * max(1, int(shape[d]))
    return as_strided(_UNREAD[itemsize], shape, strides, writeable=False)


def elsewhere(x: MetaArray) -> MetaArray:
    """Return an array like another in memory that no tally counts, the host's."""
    away = Memory(0)
    away.nbytes, away.tallies = x.nbytes, ()
    return MetaArray(empty(x.shape, x.dtype)._unread, x.dtype, away)


def elementwise(*values: Any, dtype: Any = None) -> MetaArray:
    """Return an array of the shape to which others are broadcast and of the dtype to which they are promoted."""
    shape = _broadcast(*(x.shape if isinstance(x, MetaArray) else np.shape(x) for x in values))
    if dtype is None:
        known = {x.dtype for x in values if isinstance(x, MetaArray)}
        dtype = known.pop() if len(known) == 1 and all(_weak(x) for x in values) else _promoted(values)
    return made(shape, dtype, *values)


_broadcast = lru_cache(maxsize=4096)(np.broadcast_shapes)


def _weak(x: Any) -> bool:
    return isinstance(x, MetaArray | bool | int | float)


def _promoted(values: Sequence[Any]) -> np.dtype:
    return np.result_type(*[x.dtype if isinstance(x, MetaArray) else x for x in values])


def _operator(self: MetaArray, other: Any = 0) -> MetaArray:
    if isinstance(other, float) and self.dtype.kind in "iu":
        return elementwise(self, other, dtype="float64")
    return elementwise(self, other)


def _division(self: MetaArray, other: Any) -> MetaArray:
    return elementwise(self, other, dtype="float64") if self.dtype.kind in "iu" else _operator(self, other)


def _comparison(self: MetaArray, other: Any) -> MetaArray:
    return elementwise(self, other, dtype="bool")


def _in_place(self: MetaArray, other: Any) -> MetaArray:
    work(0, self, self, other)
    return self


for _name in ("add", "sub", "mul", "pow", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    setattr(MetaArray, f"__{_name}__", _operator)
    setattr(MetaArray, f"__r{_name}__", _operator)
    setattr(MetaArray, f"__i{_name}__", _in_place)
for _name in ("truediv", "rtruediv"):
    setattr(MetaArray, f"__{_name}__", _division)
MetaArray.__itruediv__ = _in_place  # type: ignore[attr-defined]
for _name in ("neg", "pos", "abs", "invert"):
    setattr(MetaArray, f"__{_name}__", _operator)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(MetaArray, f"__{_name}__", _comparison)
