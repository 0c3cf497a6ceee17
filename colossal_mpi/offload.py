"""Offload: arrays of a device that are kept in host memory while the device does not need them.

The optimizers call it for their state. It copies to pinned memory (`colossal_mpi.comm.staging`), which the bus reads at
full speed. Arrays that are in host memory anyway stay as they are.
"""

from __future__ import annotations

from colossal_mpi import meta
from colossal_mpi.comm.staging import pool
from colossal_mpi.distarray import DistArray
from colossal_mpi.meta.array import MetaArray
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def to_host(array: DistArray) -> DistArray:
    """Return the array with its block in host memory; the array itself if its block is there already."""
    block, device = array.local, backend.device_of(array.local)
    if device is None:
        return array
    if isinstance(block, MetaArray):
        return array.like(meta.on_host(block))
    host = pool(device).array(block.size, backend.numpy_dtype(block.dtype)).reshape(block.shape)
    device.read(block, host)
    device.synchronize()
    return array.like(host)


def to_device(offloaded: DistArray, beside: Block) -> DistArray:
    """Return an offloaded array with its block on the device of `beside`; the array itself on a CPU."""
    if isinstance(offloaded.local, MetaArray):
        return offloaded.copy()
    return offloaded.like(backend.to_block(offloaded.local, beside))


def write_back(array: DistArray, offloaded: DistArray) -> None:
    """Copy the block of an array that `to_device` returned back to the host memory of its offloaded array."""
    device = backend.device_of(array.local)
    if device is not None and not isinstance(array.local, MetaArray):
        device.read(array.local, offloaded.local)
        device.synchronize()
