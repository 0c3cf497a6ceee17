"""Blocks of all array libraries: NumPy arrays in host memory, CuPy arrays on a GPU, arrays of a registered device.

Every module that computes on blocks calls this one. A new block goes to the device of its grid; afterwards the type of
the block decides. Only the first grid that asks for a GPU imports CuPy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, is_numpy_array

from colossal_mpi.errors import GridError

Block: TypeAlias = Any
"""One rank's part of a distributed array: ``numpy.ndarray``, ``cupy.ndarray`` or another array of the array API.

It is `Any` on purpose: no static type describes the arrays of all these libraries.
"""

_NUMPY = array_namespace(np.empty(0))


class Device(Protocol):
    """An array library whose blocks are not in host memory.

    The library puts work on blocks into a stream, in order. `read` and `write` are part of the stream, so that the host
    side of a copy may be touched only after `synchronize`.
    """

    def __hash__(self) -> int: ...

    def count(self) -> int:
        """Return the number of devices of this node, 0 if the library cannot be used."""

    def namespace(self, index: int) -> Any:
        """Make a device of this node the current one and return the array namespace that makes blocks on it."""

    def owns(self, block: Block) -> bool:
        """Return whether a block is an array of this library."""

    def read(self, block: Block, host: np.ndarray) -> None:
        """Put a copy of a block to a host array of its shape and dtype, in C order, into the stream."""

    def write(self, block: Block, host: np.ndarray) -> None:
        """Put a copy of a host array in C order to a block of its shape and dtype into the stream."""

    def synchronize(self) -> None:
        """Wait until everything in the stream is done."""

    def pinned(self, nbytes: int) -> Any:
        """Return a writable buffer of page-locked host memory, from which copies need no further staging."""

    def gemm(self, a: Block, b: Block, c: Block, alpha: complex, beta: complex, conj: tuple[bool, bool]) -> bool:
        """Compute ``c = alpha op(a) op(b) + beta c`` in place.

        Parameters
        ----------
        a, b, c : array
            Matrices ``[m, k]``, ``[k, n]`` and ``[m, n]`` of one dtype.
        alpha, beta : complex
            The factors.
        conj : (bool, bool)
            Whether op is the complex conjugate, for a and for b.

        Returns
        -------
        bool
            False if the device has no such gemm; c is then unchanged.
        """

    def matmul(self, a: Block, b: Block) -> Block:
        """Return the products of two stacks of matrices in a new block."""


class _CuPy:
    """GPUs through CuPy; each rank uses its current stream."""

    def count(self) -> int:
        if importlib.util.find_spec("cupy") is None:
            return 0
        try:
            import cupy
        except ImportError:  # CuPy is installed, but not the CUDA for which it was built
            return 0
        try:
            return int(cupy.cuda.runtime.getDeviceCount())
        except cupy.cuda.runtime.CUDARuntimeError:
            return 0

    def namespace(self, index: int) -> Any:
        import cupy

        cupy.cuda.Device(index).use()
        return array_namespace(cupy.empty(0))

    def owns(self, block: Block) -> bool:
        return is_cupy_array(block)

    def read(self, block: Block, host: np.ndarray) -> None:
        if block.size:
            block.get(out=host, blocking=False)

    def write(self, block: Block, host: np.ndarray) -> None:
        if block.size:
            block.set(host)

    def synchronize(self) -> None:
        import cupy

        cupy.cuda.get_current_stream().synchronize()

    def pinned(self, nbytes: int) -> Any:
        import cupy

        # alloc_pinned_memory will not do: CuPy's pool behind it keeps all freed memory, without a bound.
        return cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(nbytes), 0)

    def gemm(self, a: Block, b: Block, c: Block, alpha: complex, beta: complex, conj: tuple[bool, bool]) -> bool:
        if c.dtype.name not in ("float32", "float64", "complex64", "complex128"):
            return False
        from cupy import cublas

        (a, op_a), (b, op_b) = ((x.T, "H") if flip else (x, "N") for x, flip in zip((a, b), conj, strict=True))
        cublas.gemm(op_a, op_b, a, b, out=c, alpha=alpha, beta=beta)
        return True

    def matmul(self, a: Block, b: Block) -> Block:
        return namespace(a, b).matmul(a, b)


_devices: dict[str, Device] = {"cuda": _CuPy()}
_preferred = "auto"


def register(name: str, device: Device) -> None:
    """Register a device, so that ``Grid(device=name)`` uses it: for tests and array libraries other than CuPy."""
    _devices[name] = device


def prefer(name: str) -> None:
    """Choose the meaning of ``device="auto"``: ``"auto"`` (a GPU if there is one), ``"cpu"`` or another device."""
    global _preferred
    _preferred = name


def device_of(block: Block) -> Device | None:
    """Return the device library of a block, None if the block is in host memory."""
    if type(block) is np.ndarray:
        return None
    return next((device for device in _devices.values() if device.owns(block)), None)


_namespaces: dict[frozenset[type], Any] = {}
"""Namespaces by the types of blocks: array_namespace takes 3 microseconds, several times per layer."""


def namespace(*blocks: Block) -> Any:
    """Return the array namespace of `blocks`."""
    types = frozenset(map(type, blocks))
    if types not in _namespaces:
        _namespaces[types] = array_namespace(*blocks)
    return _namespaces[types]


def resolve_device(device: str, node_rank: int) -> str:
    """Return the device of a rank.

    Parameters
    ----------
    device : str
        The user's choice: ``"auto"``, ``"cpu"``, ``"cuda"`` or another registered device.
    node_rank : int
        The number of the rank on its node. Ranks take the devices of the node in turn.

    Returns
    -------
    str
        ``"cpu"`` or ``"<name>:<index>"``, for example ``"cuda:1"``.

    Raises
    ------
    GridError
        If there is no device of this name, or the node has none of them.
    """
    if device not in ("auto", "cpu", *_devices):
        raise GridError(f"device={device!r}: use 'auto', 'cpu' or 'cuda'")
    wanted = _preferred if device == "auto" else device
    name = "cuda" if wanted == "auto" else wanted
    count = 0 if name == "cpu" else _devices[name].count()
    if not count and wanted not in ("auto", "cpu"):
        raise GridError(
            f"device={wanted!r}: no CuPy or no GPU on this node; install an extra, cuda12 or cuda13, or use 'cpu'"
        )
    return f"{name}:{node_rank % count}" if count else "cpu"


def describe_gpu() -> str:
    """Return the name of the first GPU and the versions of CuPy and CUDA in a line; the node must have a GPU."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{name}, CuPy {cupy.__version__}, CUDA runtime {cupy.cuda.runtime.runtimeGetVersion()}"


def device_memory(device: str) -> int | None:
    """Return the bytes that CuPy's pool holds of a GPU; None for another device."""
    if not device.startswith("cuda"):
        return None
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


def visible_gpus() -> list[tuple[str, str]]:
    """Return PCI address and name of each GPU that this process sees, in order; none without CuPy."""
    count = _devices["cuda"].count()
    if not count:
        return []
    from cupy.cuda import runtime

    names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(count)]
    return [(runtime.deviceGetPCIBusId(i).lower(), name) for i, name in enumerate(names)]


def device_namespace(device: str) -> Any:
    """Return the array namespace in which a grid on `device` makes its blocks."""
    name, _, index = device.partition(":")
    return _NUMPY if name == "cpu" else _devices[name].namespace(int(index))


def from_dlpack(exporter: Any) -> Block:
    """Return device memory of another library as a CuPy array, ordered after the exporter's stream."""
    import cupy

    return cupy.from_dlpack(exporter)


def empty_like(block: Block, shape: Sequence[int], dtype: Any = None) -> Block:
    """Return an uninitialised block of the library and on the device of `block`."""
    xp = namespace(block)
    return xp.empty(tuple(shape), dtype=block.dtype if dtype is None else dtype)


def zeros_like(block: Block, shape: Sequence[int], dtype: Any = None) -> Block:
    """Return a block of zeros of the library and on the device of `block`."""
    xp = namespace(block)
    return xp.zeros(tuple(shape), dtype=block.dtype if dtype is None else dtype)


def sum_over(block: Block, dims: Sequence[int]) -> Block:
    """Return the sum over some dims, given as numbers that are not negative.

    The sum has the dtype of `summable`. It is made one dim after the other: NumPy adds the rows of a block one by one,
    and shorter sums lose fewer digits.
    """
    block = summable(block)
    for d in sorted(dims, reverse=True):
        block = namespace(block).sum(block, axis=d, dtype=block.dtype)
    return block


def summable(block: Block) -> Block:
    """Return a block in the dtype of `sum_dtype`, itself if it has it."""
    return namespace(block).astype(block, sum_dtype(block), copy=False)


def sum_dtype(block: Block) -> Any:
    """Return the dtype in which the elements of a block, or products of them, are summed.

    It is float32 for 16-bit floats, int64 for integers and bools, uint64 for unsigned integers, as ``numpy.sum`` has
    it, and the dtype of the block for all others.
    """
    xp, dtype = namespace(block), numpy_dtype(block.dtype)
    if is_half(dtype):
        return xp.float32
    if dtype.kind not in "biu":
        return block.dtype
    return xp.uint64 if dtype.kind == "u" else xp.int64


def contiguous(block: Block) -> Block:
    """Return a block in C order: itself if it is, else a copy."""
    return block if block.flags.c_contiguous else block.copy(order="C")


def cholesky(block: Block) -> Block | None:
    """Return the lower Cholesky factor of a Hermitian block, None if it is not numerically positive definite."""
    xp = namespace(block)
    try:
        factor = xp.linalg.cholesky(block)
    except np.linalg.LinAlgError:
        return None
    return factor if bool(xp.all(xp.isfinite(factor))) else None  # CuPy does not raise but returns NaN


def to_host(block: Block) -> np.ndarray:
    """Return the values of a block as a NumPy array; a NumPy block is not copied."""
    device = device_of(block)
    if device is None:
        return np.asarray(block)
    host = np.empty(block.shape, block.dtype)
    device.read(block, host)
    device.synchronize()
    return host


def to_block(host: np.ndarray, beside: Block) -> Block:
    """Return a host array as a block of the library and on the device of `beside`; `host` may be changed at once."""
    device = device_of(beside)
    if device is None:
        return host if is_numpy_array(beside) else namespace(beside).asarray(host)
    block = empty_like(beside, host.shape, host.dtype)
    device.write(block, np.ascontiguousarray(host))
    device.synchronize()
    return block


def synchronize(block: Block) -> None:
    """Wait until the kernels that write a block are done."""
    device = device_of(block)
    if device is not None:
        device.synchronize()


def numpy_dtype(dtype: Any) -> np.dtype:
    """Return a dtype of any library as a NumPy dtype, by which blocks of all libraries can be compared."""
    known: np.dtype = np.dtype(getattr(dtype, "_np_dtype", dtype))  # array-api-strict has dtypes of its own
    return known


def is_half(dtype: Any) -> bool:
    """Return whether a dtype is float16 or bfloat16, which MPI cannot add and has no portable type for."""
    known = numpy_dtype(dtype)
    return known.itemsize == 2 and known.name in ("float16", "bfloat16") and known.isnative


def wide_dtype(block: Block) -> Any:
    """Return the 32-bit dtype in which a block of 16-bit floats or of 8- or 16-bit integers is summed, else None."""
    xp, dtype = namespace(block), numpy_dtype(block.dtype)
    if is_half(dtype):
        return xp.float32
    if dtype.kind not in "iu" or dtype.itemsize > 2:
        return None
    return xp.int32 if dtype.kind == "i" else xp.uint32


def dtype_of(xp: Any, dtype: Any) -> Any:
    """Return the dtype of a namespace for a name or a NumPy dtype; None stays None.

    If the namespace has no dtype of the name, the NumPy dtype itself is returned: NumPy has no name for bfloat16, which
    is a dtype of the package ml_dtypes.
    """
    if dtype is None or not isinstance(dtype, str | type | np.dtype):
        return dtype
    return getattr(xp, np.dtype(dtype).name, np.dtype(dtype))
