"""A pretended device: blocks that refuse to reach NumPy or MPI raw, for tests of staging without a GPU.

Its arrays behave as CuPy's do: NumPy's values and promotion, 0-d arrays instead of scalars, no mixing with NumPy
arrays, and no functions beyond the array API. Copies between host and device, once put into the stream, are done when a
kernel is launched or the stream is synchronised and not before: code that does not synchronise reads stale bytes. A
block is given to MPI only where the grid says that MPI reads device memory, through the interface by which CuPy arrays
are (``__cuda_array_interface__``), and only with an idle stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_strict as standard
import numpy as np
from array_api_compat import array_namespace

from colossal_mpi.platform import backend

from .fake_array import DeviceArray, stream, unwrapped, wrapped

NAME = "fake"
COUNT = 2
_NUMPY = array_namespace(np.empty(0))


class Namespace:
    """The functions of the array API on the pretended device."""

    linalg: Namespace
    fft: Namespace

    def __init__(self, functions: Any, names: Any) -> None:
        self._functions, self._names = functions, names
        self.__name__ = __name__  # by which array_api_compat tells namespaces, which are modules elsewhere, apart

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
        """Return `value` on the device; the host may change it at once."""
        if isinstance(value, DeviceArray):
            return wrapped("asarray", _NUMPY.asarray(value._memory, dtype=dtype, copy=copy), (value,))
        block = DeviceArray(np.array(value, dtype=dtype))
        stream.copy("copy to device", lambda: None)
        return block


def _kernel(name: str, function: Callable) -> Callable:
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
    """The pretended device, as `colossal_mpi.platform.backend` takes it.

    Attributes
    ----------
    allocations : int
        Pieces of pinned memory that were asked for.
    """

    def __init__(self) -> None:
        self.allocations = 0

    def count(self) -> int:
        """Return two: enough for ranks to be on different ones."""
        return COUNT

    def namespace(self, index: int) -> Any:
        """Return the namespace of all devices."""
        return namespace

    def owns(self, block: Any) -> bool:
        """Say whether `block` is an array of it."""
        return type(block) is DeviceArray

    def read(self, block: DeviceArray, host: np.ndarray) -> None:
        """Put a copy to the host into the stream."""
        stream.copy("copy to host", lambda: np.copyto(host, block._memory))

    def write(self, block: DeviceArray, host: np.ndarray) -> None:
        """Put a copy from the host into the stream."""
        stream.copy("copy to device", lambda: np.copyto(block._memory, host))

    def synchronize(self) -> None:
        """Do all that is in the stream."""
        stream.synchronize()

    def pinned(self, nbytes: int) -> Any:
        """Return memory that is full of NaN, whatever the float dtype."""
        self.allocations += 1
        return bytearray(b"\xff" * nbytes)

    def gemm(self, *_: Any) -> bool:
        """Return False: products are those of the namespace."""
        return False

    def matmul(self, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        """Return the products of two stacks of matrices."""
        return namespace.matmul(a, b)


device = FakeDevice()


def install() -> None:
    """Make ``Grid(device="fake")`` a grid on the pretended device."""
    backend.register(NAME, device)
