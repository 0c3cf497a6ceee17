"""Conversions between blocks and PyTorch tensors that share their memory.

``layers.torch``, the torch kernels and users call it, and so do grids and ``from_global``, which take tensors as the
values of an array (`values_of`). It calls torch, which the first call of a user imports. Nothing that is shared is
copied: what one side writes the other reads, and the memory lives as long as either side does. On a GPU the exchange
makes the stream of the side that takes the memory wait for the stream of the side that gives it (DLPack's ``stream``).
From then on both sides must work in one stream, as they do by default, in the legacy default stream.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import is_cupy_array

from colossal_mpi.errors import DTypeError, SharingError
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

if TYPE_CHECKING:
    import torch

# Only the package ml_dtypes gives NumPy a bfloat16. NumPy does not export it by DLPack, so its bits are exported.
_BITS = {"bfloat16": "int16"}
_SHARED = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
}


def to_torch(array: Block, writable: bool = True) -> torch.Tensor:
    """Return a block, or this rank's block of a distributed array, as a tensor that shares its memory.

    Parameters
    ----------
    array : numpy.ndarray, cupy.ndarray or DistArray
        An array of any shape, 0-d and empty ones too, and of any strides that are not negative. Its dtype is a bool,
        integer, float or complex dtype that torch has, bfloat16 of ml_dtypes among them.
    writable : bool
        Whether the tensor may be written to. With False a read-only array is accepted too, and the caller promises not
        to write: torch has no read-only tensors.

    Returns
    -------
    torch.Tensor
        A tensor on the device of the block, which is not part of any graph.

    Raises
    ------
    DTypeError
        If torch has no such dtype.
    SharingError
        If the memory cannot be shared: a negative stride, unaligned or read-only memory, another kind of array.

    See Also
    --------
    from_torch : The way back.

    Notes
    -----
    **Communication:** none; whether the block is refused depends on this rank's block alone.

    Examples
    --------
    >>> tensor = to_torch(A)
    >>> tensor.mul_(2)  # A.local is doubled
    """
    import torch

    block: Block = array.local if hasattr(array, "local") else array
    if not (isinstance(block, np.ndarray) or is_cupy_array(block)):
        raise SharingError(f"to_torch: it takes a NumPy or CuPy array or a DistArray, not {type(block).__name__}")
    dtype, bits = _torch_dtype(block.dtype)
    _check_memory(block, writable)
    plain = block if bits is None else block.view(bits)
    if isinstance(plain, np.ndarray):
        if not plain.flags.writeable:
            plain = np.asarray(_Writable(plain))
        tensor = torch.from_numpy(plain)  # the result of DLPack in a quarter of its time
    else:
        tensor = torch.utils.dlpack.from_dlpack(plain)
    return tensor if bits is None else tensor.view(dtype)


def from_torch(tensor: torch.Tensor) -> Block:
    """Return a tensor as a block, a NumPy or CuPy array that shares its memory.

    Parameters
    ----------
    tensor : torch.Tensor
        A dense tensor on the CPU or a CUDA device, of any shape and strides and of a dtype that NumPy has; bfloat16
        needs ml_dtypes (and a CuPy that knows it). A tensor that requires a gradient is taken without its graph.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
        An array with the strides of the tensor.

    Raises
    ------
    DTypeError
        If NumPy has no such dtype.
    SharingError
        If the memory cannot be shared: a sparse tensor, another device, a lazy conjugate or negative, or an object that
        is no tensor.

    See Also
    --------
    to_torch : The way back.

    Notes
    -----
    **Communication:** none.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise SharingError(f"from_torch: it takes a torch.Tensor, not {type(tensor).__name__}")
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise SharingError(
            f"from_torch: a tensor of {tensor.layout} on {tensor.device.type!r} has no memory to share: "
            "make it dense, on 'cpu' or 'cuda'"
        )
    if tensor.is_conj() or tensor.is_neg():
        word = "conj" if tensor.is_conj() else "neg"
        raise SharingError(f"from_torch: a lazy {word} of another tensor: share .resolve_{word}(), a copy")
    dtype, bits = _numpy_dtype(tensor.dtype)
    return _exported(tensor) if bits is None else _exported(tensor.view(getattr(torch, bits))).view(dtype)


def values_of(source: Any) -> Any:
    """Return array-like values without PyTorch tensors: a tensor as an array, also in lists and tuples.

    Parameters
    ----------
    source : array_like
        Anything. A tensor is taken without its graph, in its own dtype (bfloat16 as that of ml_dtypes), and shares its
        memory with the result unless it is a lazy conjugate or negative, which is computed first.

    Returns
    -------
    array_like
        The values; `source` itself where no tensor is found.

    Raises
    ------
    DTypeError
        If NumPy has no such dtype.
    SharingError
        If a tensor is sparse or on a device that is neither ``cpu`` nor ``cuda``.

    Notes
    -----
    **Communication:** none.
    """
    torch = sys.modules.get("torch")  # where torch was not imported, there are no tensors
    if torch is None:
        return source
    if isinstance(source, torch.Tensor):
        plain = source.detach()
        return from_torch(plain.resolve_conj().resolve_neg() if plain.layout == torch.strided else plain)
    if isinstance(source, list | tuple) and any(isinstance(part, torch.Tensor | list | tuple) for part in source):
        return [_as_host(values_of(part)) for part in source]
    return source


def _as_host(values: Any) -> Any:
    return backend.to_host(values) if is_cupy_array(values) else values  # a list of arrays becomes a NumPy array


class _Writable:
    """A read-only array that claims to be writable: torch warns of read-only arrays, or refuses them."""

    def __init__(self, block: np.ndarray) -> None:
        interface = block.__array_interface__
        self.block, self.__array_interface__ = block, {**interface, "data": (interface["data"][0], False)}


def _check_memory(block: Block, writable: bool) -> None:
    """Refuse memory that torch cannot take; a negative stride would end the process."""
    if min(block.strides, default=0) < 0:
        raise SharingError(f"to_torch: strides {block.strides} of {block.shape}: torch has none below 0: .copy() it")
    if not isinstance(block, np.ndarray) or block.flags.carray:
        return
    if not block.flags.aligned or any(stride % block.itemsize for stride in block.strides):
        raise SharingError("to_torch: elements that are not whole steps of their size apart: .copy() it")
    if writable and not block.flags.writeable:
        raise SharingError("to_torch: a read-only array: .copy() it, or say writable=False and only read the tensor")


@cache
def _torch_dtype(dtype: np.dtype) -> tuple[torch.dtype, str | None]:
    """Return torch's dtype, and the dtype in which the bits are shared if it is another one."""
    import torch

    if dtype.name not in _SHARED or not dtype.isnative:
        raise DTypeError(
            f"to_torch: torch has no {dtype.name} of byte order {dtype.byteorder!r}: use bool, an integer, "
            "a float up to float64, complex64 or complex128, in the machine's byte order"
        )
    return getattr(torch, dtype.name), _BITS.get(dtype.name)


@cache
def _numpy_dtype(dtype: torch.dtype) -> tuple[np.dtype, str | None]:
    """Return NumPy's dtype, and the dtype in which the bits are shared if it is another one."""
    name = str(dtype).removeprefix("torch.")
    if name not in _SHARED:
        raise DTypeError(f"from_torch: NumPy has no {dtype}: use bool, an integer, a float or complex dtype")
    if name not in _BITS:
        return np.dtype(name), None
    try:
        import ml_dtypes
    except ImportError:
        raise DTypeError(f"from_torch: {name} needs the package ml_dtypes, or .to(torch.float32)") from None
    return np.dtype(getattr(ml_dtypes, name)), _BITS[name]


def _exported(tensor: torch.Tensor) -> Block:
    """Return a tensor of a dtype that both libraries know as an array."""
    # Not numpy.from_dlpack, whose arrays are read-only before NumPy 2.1.
    return backend.from_dlpack(tensor) if tensor.is_cuda else tensor.numpy()
