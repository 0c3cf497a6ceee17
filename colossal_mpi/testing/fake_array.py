"""Arrays on the pretended device of `colossal_mpi.testing.fake`, and the stream that orders what happens to them."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np


class FakeStreamError(AssertionError):
    """A buffer was given to MPI while kernels or copies were under way."""


class Stream:
    """The order in which things happen on the pretended device."""

    def __init__(self) -> None:
        self.events: deque[str] = deque(maxlen=10_000)
        self.busy = False
        self._copies: list[Callable[[], None]] = []

    def launch(self, kernel: str) -> None:
        """Note that a kernel runs; what was put into the stream before it is done first."""
        self._finish_copies()
        self.busy = True
        self.events.append(f"kernel {kernel}")

    def copy(self, event: str, action: Callable[[], None]) -> None:
        """Put a copy into the stream."""
        self.busy = True
        self._copies.append(action)
        self.events.append(event)

    def synchronize(self) -> None:
        """Do all that is in the stream."""
        self._finish_copies()
        self.busy = False
        self.events.append("synchronised")

    def give(self) -> None:
        """Note that MPI is given a buffer of the device."""
        self.events.append("given to MPI")
        if self.busy:
            raise FakeStreamError(f"MPI is given device memory before the stream is idle: {list(self.events)[-5:]}")

    def _finish_copies(self) -> None:
        copies, self._copies = self._copies, []
        for action in copies:
            action()


stream = Stream()
"""The one stream of the pretended device."""


class DeviceArray:
    """An array on the pretended device."""

    __slots__ = ("__weakref__", "_memory")
    __array_ufunc__ = None  # NumPy scalars leave arithmetic to this class; NumPy arrays are refused by it
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    dtype = property(lambda self: self._memory.dtype)
    shape = property(lambda self: self._memory.shape)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    flags = property(lambda self: self._memory.flags)
    device = property(lambda self: "fake:0")
    T = property(lambda self: DeviceArray(self._memory.T))
    mT = property(lambda self: DeviceArray(self._memory.mT))  # noqa: N815 (its name in the array API)

    @property
    def base(self) -> DeviceArray | None:
        """The array whose memory this one is a view of."""
        return None if self._memory.base is None else DeviceArray(self._memory.base)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        stream.give()
        return {**self._memory.__array_interface__, "version": 3, "strides": None, "stream": None}

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        from .fake import namespace

        return namespace

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("an array on the pretended device is no NumPy array: use backend.to_host")

    def __reduce__(self) -> Any:
        raise TypeError("an array on the pretended device is not pickled: use backend.to_host")

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, index: Any) -> DeviceArray:
        return wrapped("getitem", self._memory[unwrapped(index)], (self,))

    def __setitem__(self, index: Any, value: Any) -> None:
        stream.launch("setitem")
        self._memory[unwrapped(index)] = unwrapped(value)

    def reshape(self, *shape: Any) -> DeviceArray:
        """Return the elements in another shape."""
        return wrapped("reshape", self._memory.reshape(*shape), (self,))

    def view(self, dtype: Any) -> DeviceArray:
        """Return the same memory as another dtype."""
        return DeviceArray(self._memory.view(dtype))

    def copy(self, order: Literal["C", "F"] = "C") -> DeviceArray:
        """Return a copy."""
        return wrapped("copy", self._memory.copy(order), ())

    def item(self) -> Any:
        """Return the only element as a Python number, after all that is in the stream."""
        stream.synchronize()
        return self._memory.item()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype})"


def unwrapped(value: Any) -> Any:
    """Return arguments with the memory of device arrays in their place; NumPy arrays are refused, as CuPy does."""
    if isinstance(value, DeviceArray):
        return value._memory
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: bring it to the device with asarray")
    if isinstance(value, tuple | list):
        return type(value)(unwrapped(item) for item in value)
    return value


def wrapped(name: str, result: Any, arguments: tuple) -> Any:
    """Return results as device arrays; a kernel has made those that are no view of an argument."""
    if isinstance(result, np.ndarray | np.generic):
        memory = np.asarray(result)
        sources = [value._memory for value in arguments if isinstance(value, DeviceArray)]
        if memory.size and not any(np.may_share_memory(memory, source) for source in sources):
            stream.launch(name)
        return DeviceArray(memory)
    if isinstance(result, tuple | list):
        parts = [wrapped(name, part, arguments) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def _binary(name: str) -> Callable[[DeviceArray, Any], Any]:
    function = getattr(np.ndarray, name)

    def method(self: DeviceArray, other: Any) -> Any:
        if isinstance(other, list | tuple | str):
            return NotImplemented
        result = function(self._memory, unwrapped(other))
        return result if result is NotImplemented else wrapped(name.strip("_"), result, ())

    return method


def _in_place(name: str) -> Callable[[DeviceArray, Any], DeviceArray]:
    function = getattr(np.ndarray, name)

    def method(self: DeviceArray, other: Any) -> DeviceArray:
        stream.launch(name.strip("_"))
        function(self._memory, unwrapped(other))
        return self

    return method


def _unary(name: str) -> Callable[[DeviceArray], DeviceArray]:
    function = getattr(np.ndarray, name)
    return lambda self: wrapped(name.strip("_"), function(self._memory), ())


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
for _name in _ARITHMETIC:
    setattr(DeviceArray, f"__{_name}__", _binary(f"__{_name}__"))
    setattr(DeviceArray, f"__r{_name}__", _binary(f"__r{_name}__"))
    setattr(DeviceArray, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(DeviceArray, f"__{_name}__", _binary(f"__{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(DeviceArray, f"__{_name}__", _unary(f"__{_name}__"))
