"""Meta arrays: arrays with a shape, a dtype and strides, but without memory, and the tally of their memory and flop.

Blocks of meta grids (`Grid.meta`) are such arrays. NumPy makes their views, from an array that is never read, so that
strides and copies are NumPy's. A meta array has no values: as a number it is 0. `tally` adds up the bytes that the
arrays of a dry run would take and the flop of their products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
from array_api_compat import array_namespace
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike

_NUMPY = array_namespace(np.empty(0))
_UNREAD = {n: np.zeros(1, f"u{n}") for n in (1, 2, 4, 8)} | {16: np.zeros(1, "c16")}


class Clock(Protocol):
    """A clock that operations move forward, such as `colossal_mpi.machine.Clock`."""

    def compute(self, flops: float, nbytes: int) -> None:
        """Let the time of one operation pass.

        Parameters
        ----------
        flops : float
            Flop of the operation if it is a product, else 0.
        nbytes : int
            Bytes that it reads and writes.
        """

    def now(self) -> float:
        """Return the time that has passed.

        Returns
        -------
        float
            Seconds.
        """


@dataclass
class Tally:
    """The memory and the flop of the meta arrays that were made while it was open.

    Parameters
    ----------
    now : int
        Bytes of the arrays that are alive.
    peak : int
        The most bytes that were alive at any moment.
    flops : int
        Flop of the products: 2 m n k each.
    clock : Clock, optional
        The clock that the operations move forward.
    """

    now: int = 0
    peak: int = 0
    flops: int = 0
    clock: Clock | None = None


_open: list[Tally] = []


@contextmanager
def tally(clock: Clock | None = None) -> Iterator[Tally]:
    """Count meta arrays and their products until the block ends.

    Parameters
    ----------
    clock : Clock, optional
        A clock that the operations move forward by the time that they would take.

    Yields
    ------
    Tally
        The counts, which grow while the block runs.

    Examples
    --------
    >>> with meta.tally() as counted:
    ...     block = Grid.meta(row=1000).empty((10**6, 10**6), "float64")
    >>> counted.peak
    8000000000000
    """
    counted = Tally(clock=clock)
    _open.append(counted)
    try:
        yield counted
    finally:
        _open.remove(counted)


def work(flops: int, *arrays: object) -> None:
    """Enter an operation into the open tallies.

    Parameters
    ----------
    flops : int
        Flop of the operation if it is a product, else 0.
    *arrays : object
        The operands and results of the operation; objects other than meta arrays take no memory.
    """
    for one in _open:
        one.flops += flops
        if one.clock is not None:
            one.clock.compute(flops, sum([x.nbytes for x in arrays if type(x) is MetaArray]))


class Memory:
    """The memory that an array and its views would share.

    Parameters
    ----------
    nbytes : int
        Its size in bytes. The tallies that are open now count it until it is garbage.
    """

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
    """An array with a shape, a dtype and strides, but without memory.

    It has the operators of the array API; `namespace` has the functions.

    Parameters
    ----------
    unread : numpy.ndarray
        An array of the shape and the strides, which is never read.
    dtype : numpy.dtype
        Dtype of the elements.
    memory : Memory
        The memory that the array would lie in.

    Attributes
    ----------
    shape : tuple of int
        Size of each dim.
    ndim, size, nbytes : int
        Number of dims, elements and bytes.
    """

    __slots__ = ("_unread", "dtype", "memory", "nbytes", "ndim", "shape", "size")
    __array_ufunc__ = None
    namespace: ClassVar[ModuleType]
    """The module `colossal_mpi.meta.namespace`, which sets this attribute."""

    def __init__(self, unread: np.ndarray, dtype: np.dtype, memory: Memory) -> None:
        self._unread, self.dtype, self.memory = unread, dtype, memory
        self.shape, self.ndim, self.size = unread.shape, unread.ndim, unread.size
        self.nbytes = self.size * dtype.itemsize

    @property
    def flags(self) -> Any:
        """NumPy's flags of the array's memory layout."""
        return self._unread.flags

    def __array_namespace__(self, **_: object) -> ModuleType:
        return type(self).namespace

    def _view(self, unread: np.ndarray) -> MetaArray:
        return MetaArray(unread, self.dtype, self.memory)

    def reshape(self, shape: int | Sequence[int], copy: bool | None = None) -> MetaArray:
        """Return the array in another shape, as a view where NumPy makes one and else as a copy.

        Parameters
        ----------
        shape : int or sequence of int
            The new shape; one dim may be -1.
        copy : bool, optional
            False forbids a copy.

        Returns
        -------
        MetaArray
            The view or the copy.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        try:
            return self._view(_NUMPY.reshape(self._unread, shape, copy=False))
        except (AttributeError, ValueError):
            known = -math.prod(shape) if -1 in shape else 0
            whole = tuple(self.size // known if n == -1 and known else n for n in shape)
            if copy is False or math.prod(whole) != self.size:
                raise
            return result(whole, self.dtype, self)

    def transpose(self, order: Sequence[int]) -> MetaArray:
        """Return a view with the dims in another order.

        Parameters
        ----------
        order : sequence of int
            The old dims in their new order.

        Returns
        -------
        MetaArray
            The view.
        """
        return self._view(self._unread.transpose(order))

    @property
    def T(self) -> MetaArray:  # noqa: N802
        """The array with its dims reversed, as a view."""
        return self.transpose(tuple(reversed(range(self.ndim))))

    def broadcast(self, shape: Sequence[int]) -> MetaArray:
        """Return a view of a larger shape.

        Parameters
        ----------
        shape : sequence of int
            A shape that NumPy can broadcast the array to.

        Returns
        -------
        MetaArray
            The view.
        """
        return self._view(np.broadcast_to(self._unread, tuple(shape)))

    def copy(self, order: str = "C") -> MetaArray:
        """Return a copy in C order.

        Parameters
        ----------
        order : str
            Any of NumPy's orders; the copy has C order whatever it is.

        Returns
        -------
        MetaArray
            The copy.
        """
        return result(self.shape, self.dtype, self)

    def view(self, dtype: DTypeLike) -> MetaArray:
        """Return the same memory in another dtype.

        Parameters
        ----------
        dtype : dtype
            A dtype of the same size.

        Returns
        -------
        MetaArray
            The view.
        """
        return MetaArray(self._unread, np.dtype(dtype), self.memory)

    def __getitem__(self, index: Any) -> MetaArray:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, MetaArray) for part in parts):
            return empty((0,), self.dtype)  # a mask, whose elements are all false, chooses none
        whole = parts if any(part is Ellipsis for part in parts) else (*parts, ...)
        return self._view(self._unread[whole])  # with the ellipsis it is a view, never an element

    def __setitem__(self, index: Any, value: Any) -> None:
        work(0, value, value if isinstance(value, MetaArray) else self)

    def __iter__(self) -> Iterator[MetaArray]:
        return (self[i] for i in range(self.shape[0]))

    def item(self) -> int:
        """Return 0, since the array has no values.

        Returns
        -------
        int
            0.
        """
        return 0

    def __bool__(self) -> bool:
        return False

    def __int__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0

    def __index__(self) -> int:
        return 0

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("a meta array has no values that NumPy could read: run this on a grid of real ranks")

    __hash__ = None  # type: ignore[assignment]


def empty(shape: Sequence[int], dtype: DTypeLike) -> MetaArray:
    """Return a meta array in C order.

    Parameters
    ----------
    shape : sequence of int
        Size of each dim.
    dtype : dtype
        Dtype of the elements.

    Returns
    -------
    MetaArray
        The array, whose bytes the open tallies count.
    """
    kind = dtype if isinstance(dtype, np.dtype) else np.dtype(dtype)
    unread = _unread(tuple(shape), kind.itemsize)
    return MetaArray(unread, kind, Memory(unread.size * kind.itemsize))


def result(shape: Sequence[int], dtype: DTypeLike, *read: object) -> MetaArray:
    """Return the array that an operation writes, and enter the operation into the open tallies.

    Parameters
    ----------
    shape : sequence of int
        Size of each dim.
    dtype : dtype
        Dtype of the elements.
    *read : object
        The operands that the operation reads.

    Returns
    -------
    MetaArray
        The array, in C order.
    """
    written = empty(shape, dtype)
    work(0, written, *read)
    return written


@lru_cache(maxsize=4096)
def _unread(shape: tuple[int, ...], itemsize: int) -> np.ndarray:
    """Return an array of any size in C order that must not be read: its memory is a single element."""
    strides, step = [0] * len(shape), itemsize
    for d in reversed(range(len(shape))):
        strides[d], step = step, step * max(1, int(shape[d]))
    return as_strided(_UNREAD[itemsize], shape, strides, writeable=False)


def on_host(x: MetaArray) -> MetaArray:
    """Return a meta array of the same shape and dtype in host memory, which no tally counts.

    Parameters
    ----------
    x : MetaArray
        An array on a device.

    Returns
    -------
    MetaArray
        An array of the same shape and dtype, in C order.
    """
    host = Memory(0)
    host.nbytes, host.tallies = x.nbytes, ()
    return MetaArray(_unread(x.shape, x.dtype.itemsize), x.dtype, host)


def elementwise(*values: Any, dtype: DTypeLike | None = None) -> MetaArray:
    """Return the result of an elementwise operation: operands are broadcast, and promoted unless a dtype is given."""
    shape = _broadcast(*(x.shape if isinstance(x, MetaArray) else np.shape(x) for x in values))
    if dtype is None:
        known = {x.dtype for x in values if isinstance(x, MetaArray)}
        dtype = known.pop() if len(known) == 1 and all(_weak(x) for x in values) else _promoted(values)
    return result(shape, dtype, *values)


_broadcast = lru_cache(maxsize=4096)(np.broadcast_shapes)


def _weak(x: object) -> bool:
    """Return whether a value leaves the dtype of a meta array as it is."""
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
