"""Where blocks live: NumPy arrays in host memory or CuPy arrays on a GPU.

The grid's device decides when a block is made; afterwards the block itself decides. CuPy is imported by the
first grid that asks for a GPU and by nothing else.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_numpy_array

from colossal_mpi.errors import GridError

Block = Any
"""One rank's part of a distributed array: ``numpy.ndarray``, ``cupy.ndarray`` or another array of the array API."""


_NUMPY = array_namespace(np.empty(0))


def namespace(*blocks: Block) -> Any:
    """Return the array namespace of `blocks`."""
    if all(type(block) is np.ndarray for block in blocks):
        return _NUMPY  # array_namespace takes 3 microseconds, several times per layer
    return array_namespace(*blocks)


def resolve_device(device: str, node_rank: int) -> str:
    """Return ``"cpu"`` or ``"cuda:<i>"`` for the rank that is number `node_rank` on its node.

    Raises
    ------
    GridError
        If `device` is not one of ``auto``, ``cpu`` and ``cuda``, or ``cuda`` is asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise GridError(f"device={device!r}: use 'auto', 'cpu' or 'cuda'")
    gpus = 0 if device == "cpu" else _gpus()
    if device == "cuda" and not gpus:
        raise GridError(
            "device='cuda': no CuPy or no GPU on this node; install an extra, cuda12 or cuda13, or use 'cpu'"
        )
    return f"cuda:{node_rank % gpus}" if gpus else "cpu"


def _gpus() -> int:
    if importlib.util.find_spec("cupy") is None:
        return 0
    import cupy

    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


def device_namespace(device: str) -> Any:
    """Return the array namespace in which a grid on `device` makes its blocks."""
    if device == "cpu":
        return _NUMPY
    import cupy

    cupy.cuda.Device(int(device.partition(":")[2])).use()
    return array_namespace(cupy.empty(0))


def empty_like(block: Block, shape: Sequence[int], dtype: Any = None) -> Block:
    """Return an uninitialised block of `shape` beside `block`: same library, same device."""
    xp = namespace(block)
    return xp.empty(tuple(shape), dtype=block.dtype if dtype is None else dtype)


def zeros_like(block: Block, shape: Sequence[int], dtype: Any = None) -> Block:
    """Return a block of zeros of `shape` beside `block`."""
    xp = namespace(block)
    return xp.zeros(tuple(shape), dtype=block.dtype if dtype is None else dtype)


def contiguous(block: Block) -> Block:
    """Return a NumPy or CuPy block in C order, copied only where it is not."""
    return block if block.flags.c_contiguous else block.copy(order="C")


def cholesky(block: Block) -> Block | None:
    """Return the lower Cholesky factor of a Hermitian block, None where it is not numerically positive definite."""
    xp = namespace(block)
    try:
        factor = xp.linalg.cholesky(block)
    except np.linalg.LinAlgError:
        return None
    return factor if bool(xp.all(xp.isfinite(factor))) else None  # CuPy raises nothing and returns NaN


def to_host(block: Block) -> np.ndarray:
    """Return the values of `block` as a NumPy array, without a copy where it is one."""
    if is_numpy_array(block):
        return block
    if is_cupy_array(block):
        return block.get()
    return np.asarray(block)


def to_block(host: np.ndarray, beside: Block) -> Block:
    """Return `host` as a block of the library and on the device of `beside`."""
    return host if is_numpy_array(beside) else namespace(beside).asarray(host)


def mpi_can_read(block: Block) -> bool:
    """Say whether MPI may be given the memory of `block` itself.

    Host memory always; GPU memory only on the user's word, ``COLOSSAL_MPI_CUDA_AWARE=1``, since a library that is
    not CUDA-aware answers a device pointer with a segmentation fault.
    """
    if is_numpy_array(block):
        return True
    return is_cupy_array(block) and os.environ.get("COLOSSAL_MPI_CUDA_AWARE") == "1"


def synchronize(block: Block) -> None:
    """Wait until the kernels that write `block` are done, before MPI reads its memory."""
    if is_cupy_array(block):
        import cupy

        cupy.cuda.get_current_stream().synchronize()


def numpy_dtype(dtype: Any) -> np.dtype:
    """Return `dtype` as a NumPy dtype; blocks of all libraries compare by it."""
    return np.dtype(getattr(dtype, "_np_dtype", dtype))  # array-api-strict has dtypes of its own


def dtype_of(xp: Any, dtype: Any) -> Any:
    """Return the dtype of a name, or of NumPy, as the namespace `xp` has it; None stays None."""
    if dtype is None or not isinstance(dtype, str | type | np.dtype):
        return dtype
    return getattr(xp, np.dtype(dtype).name)
