"""Arrays of a device that are kept in host memory while they are not needed there.

In pinned memory, from which copies go at the speed of the bus. Arrays in host memory anyway stay what they are.
"""

from __future__ import annotations

from colossal_mpi import backend, ghost
from colossal_mpi.backend import Block
from colossal_mpi.distarray import DistArray
from colossal_mpi.ghost import Ghost
from colossal_mpi.staging import pool


def park(array: DistArray) -> DistArray:
    """Return the array with its block in host memory, the array itself where that is in host memory."""
    block, device = array.local, backend.device_of(array.local)
    if device is None:
        return array
    if isinstance(block, Ghost):
        return array.like(ghost.elsewhere(block))
    host = pool(device).array(block.size, backend.numpy_dtype(block.dtype)).reshape(block.shape)
    device.read(block, host)
    device.synchronize()
    return array.like(host)


def fetch(parked: DistArray, beside: Block) -> DistArray:
    """Return an array that `park` returned with its block on the device of another; the array itself on a CPU."""
    if isinstance(parked.local, Ghost):
        return parked.copy()
    return parked.like(backend.to_block(parked.local, beside))


def put_back(array: DistArray, parked: DistArray) -> None:
    """Copy what `fetch` returned, as it is now, to host memory."""
    device = backend.device_of(array.local)
    if device is not None and not isinstance(array.local, Ghost):
        device.read(array.local, parked.local)
        device.synchronize()
