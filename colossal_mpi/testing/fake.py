"""A fake device without a GPU, whose blocks refuse to reach NumPy or MPI by mistake.

The plugin installs it for ``--device=fake``, and tests of staging watch its stream. Its arrays behave as CuPy's do:
they have NumPy's values and promotion, 0-d arrays in place of scalars, no mixing with NumPy arrays, and no functions
beyond the array API. The module implements `colossal_mpi.platform.backend.Device`.

A copy between host and device is put into the stream and happens when a kernel is launched or the stream is
synchronised, and not before. Code that does not synchronise therefore reads stale bytes. MPI is given a block only
where the grid says that MPI reads device memory, through the interface that CuPy's arrays have
(``__cuda_array_interface__``), and only while the stream is idle.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import array_api_strict as standard
import numpy as np
from array_api_compat import array_namespace

from colossal_mpi.platform import backend

NAME = "fake"
COUNT = 2
_NUMPY = array_namespace(np.empty(0))


class FakeStreamError(AssertionError):
    """MPI was given a buffer while kernels or copies were still in the stream."""


class Stream:
    """The stream of the fake device, which runs kernels and copies in order."""

    def __init__(self) -> None:
        self.events: deque[str] = deque(maxlen=10_000)
        self.busy = False
        self._copies: list[Callable[[], None]] = []

    def launch(self, kernel: str) -> None:
        """Record that a kernel runs, after the copies that were put into the stream before it."""
        self._finish_copies()
        self.busy = True
        self.events.append(f"kernel {kernel}")

    def copy(self, event: str, action: Callable[[], None]) -> None:
        """Put a copy into the stream."""
        self.busy = True
        self._copies.append(action)
        self.events.append(event)

    def synchronize(self) -> None:
        """Do everything that is in the stream."""
        self._finish_copies()
        self.busy = False
        self.events.append("synchronised")

    def give(self) -> None:
        """Record that MPI is given a buffer of the device.

        Raises
        ------
        FakeStreamError
            If the stream is not idle.
        """
        self.events.append("given to MPI")
        if self.busy:
            raise FakeStreamError(f"MPI is given device memory before the stream is idle: {list(self.events)[-5:]}")

    def _finish_copies(self) -> None:
        copies, self._copies = self._copies, []
        for action in copies:
            action()


stream = Stream()
"""The only stream of the fake device."""


_T = TypeVar("_T")


class DeviceArray:
    """An array on the fake device, with the operators of the array API."""

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
    device = property(lambda self: f"{NAME}:0")
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
        return namespace

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("an array on the simulated device is no NumPy array: use backend.to_host")

    def __reduce__(self) -> Any:
        raise TypeError("an array on the simulated device is not pickled: use backend.to_host")

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, index: Any) -> DeviceArray:
        return _device_array("getitem", self._memory[unwrapped(index)], self)

    def __setitem__(self, index: Any, value: Any) -> None:
        stream.launch("setitem")
        self._memory[unwrapped(index)] = unwrapped(value)

    def reshape(self, *shape: Any) -> DeviceArray:
        """Return the elements in another shape."""
        return _device_array("reshape", self._memory.reshape(*shape), self)

    def view(self, dtype: Any) -> DeviceArray:
        """Return a view of the same memory in another dtype."""
        return DeviceArray(self._memory.view(dtype))

    def copy(self, order: Literal["C", "F"] = "C") -> DeviceArray:
        """Return a copy."""
        return _device_array("copy", self._memory.copy(order))

    def item(self) -> Any:
        """Return the only element as a Python number, after everything that is in the stream."""
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
    """Return arguments with each device array replaced by its memory; refuse NumPy arrays, as CuPy does."""
    if isinstance(value, DeviceArray):
        return value._memory
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: bring it to the device with asarray")
    if isinstance(value, tuple | list):
        return type(value)(unwrapped(item) for item in value)
    return value


def _device_array(name: str, result: np.ndarray | np.generic, *arguments: object) -> DeviceArray:
    """Return a NumPy result as a device array; unless it is a view of an argument, record the kernel that made it."""
    memory = np.asarray(result)
    sources = [value._memory for value in arguments if isinstance(value, DeviceArray)]
    if memory.size and not any(np.may_share_memory(memory, source) for source in sources):
        stream.launch(name)
    return DeviceArray(memory)


def wrapped(name: str, result: Any, arguments: tuple[object, ...]) -> Any:
    """Return the results of a function, which may be nested in tuples, with device arrays in place of NumPy's."""
    if isinstance(result, np.ndarray | np.generic):
        return _device_array(name, result, *arguments)
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


class Namespace:
    """The functions of the array API on the fake device, made from NumPy's when they are first asked for."""

    linalg: Namespace
    fft: Namespace

    def __init__(self, functions: Any, names: Any) -> None:
        self._functions, self._names = functions, names
        self.__name__ = __name__  # array_api_compat tells namespaces apart by it, which are modules elsewhere

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"{name} is not in the array API")
        found = getattr(self._functions, name)
        if isinstance(found, type) or not callable(found):
            return found  # dtypes and constants
        made = _kernel(name, found)
        setattr(self, name, made)
        return made

    def asarray(self, value: Any, /, *, dtype: Any = None, copy: bool | None = None, **_: Any) -> DeviceArray:
        """Return `value` on the device; the host may change its own copy at once."""
        if isinstance(value, DeviceArray):
            return _device_array("asarray", _NUMPY.asarray(value._memory, dtype=dtype, copy=copy), value)
        block = DeviceArray(np.array(value, dtype=dtype))
        stream.copy("copy to device", lambda: None)
        return block


def _kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, device: Any = None, out: DeviceArray | None = None, **kwargs: Any) -> Any:
        options = {key: unwrapped(value) for key, value in kwargs.items()}
        if out is not None:
            stream.launch(name)
            function(*unwrapped(args), out=out._memory, **options)
            return out
        result = function(*unwrapped(args), **options)
        return DeviceArray(result) if name.startswith("empty") else wrapped(name, result, args)

    return kernel


_PARTS = {"linalg", "fft"}
namespace = Namespace(_NUMPY, {"float16", *dir(standard)} - _PARTS)  # float16: CuPy has it, the standard has not
namespace.linalg = Namespace(_NUMPY.linalg, dir(standard.linalg))
namespace.fft = Namespace(_NUMPY.fft, dir(standard.fft))


class FakeDevice:
    """The fake device, as a `colossal_mpi.platform.backend.Device`.

    Attributes
    ----------
    allocations : int
        The number of allocations of pinned memory.
    """

    def __init__(self) -> None:
        self.allocations = 0

    def count(self) -> int:
        """Return 2: enough for ranks to be on different devices."""
        return COUNT

    def namespace(self, index: int) -> Any:
        return namespace

    def owns(self, block: Any) -> bool:
        return type(block) is DeviceArray

    def read(self, block: DeviceArray, host: np.ndarray) -> None:
        stream.copy("copy to host", lambda: np.copyto(host, block._memory))

    def write(self, block: DeviceArray, host: np.ndarray) -> None:
        stream.copy("copy to device", lambda: np.copyto(block._memory, host))

    def synchronize(self) -> None:
        stream.synchronize()

    def pinned(self, nbytes: int) -> Any:
        """Return host memory that is full of NaN, whatever the float dtype."""
        self.allocations += 1
        return bytearray(b"\xff" * nbytes)

    def gemm(self, *_: Any) -> bool:
        """Return False: the namespace's functions compute the products."""
        return False

    def matmul(self, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        return _device_array("matmul", np.matmul(a._memory, b._memory), a, b)


device = FakeDevice()


def install() -> None:
    """Register the fake device, so that ``Grid(device="fake")`` makes its blocks on it."""
    backend.register(NAME, device)
