"""Arrays of a device that are kept in host memory while they are not needed there.

In pinned memory, from which copies go at the speed of the bus. Arrays in host memory anyway stay what they are.
"""

from __future__ import annotations

from colossal_mpi import meta
from colossal_mpi.comm.staging import pool
from colossal_mpi.distarray import DistArray
from colossal_mpi.meta.array import MetaArray
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def to_host(array: DistArray) -> DistArray:
    """Return the array with its block in host memory, the array itself where that is in host memory."""
    block, device = array.local, backend.device_of(array.local)
    if device is None:
        return array
    if isinstance(block, MetaArray):
        return array.like(meta.elsewhere(block))
    host = pool(device).array(block.size, backend.numpy_dtype(block.dtype)).reshape(block.shape)
    device.read(block, host)
    device.synchronize()
    return array.like(host)


def to_device(offloaded: DistArray, beside: Block) -> DistArray:
    """Return an array that `to_host` returned with its block on the device of another; the array itself on a CPU."""
    if isinstance(offloaded.local, MetaArray):
        return offloaded.copy()
    return offloaded.like(backend.to_block(offloaded.local, beside))


def write_back(array: DistArray, offloaded: DistArray) -> None:
    """Copy what `to_device` returned, as it is now, to host memory."""
    device = backend.device_of(array.local)
    if device is not None and not isinstance(array.local, MetaArray):
        device.read(array.local, offloaded.local)
        device.synchronize()
