"""Buffers between blocks and MPI: the memory of the block itself, or a pinned copy on the host.

`colossal_mpi.comm.collectives` and `colossal_mpi.comm.messages` call it, and offloading uses its pool of pinned memory.
A block in host memory is given to MPI as it is. A block on a device is given to MPI as it is on a grid whose ranks have
agreed that their MPI reads device memory (`colossal_mpi.platform.cuda_aware`); else it is copied through page-locked
host buffers from a pool. Both ways the stream of the device is synchronised after the last kernel and before MPI gets a
buffer, to read or to write: a new block can lie where a kernel still reads one that was just freed. 16-bit floats, for
which MPI has no type, are sent as 16-bit integers.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block, Device

_SMALLEST = 1 << 12
Buffer: TypeAlias = Any
"""Page-locked memory of a device, an object with Python's buffer protocol."""


class Pool:
    """Pinned host memory that is used again, in sizes of powers of two.

    A buffer comes back when nothing refers to it any more. A request under way in MPI refers to its buffers, so that
    they are never handed out a second time.

    Parameters
    ----------
    device : Device
        The device that allocates the memory, which takes its driver hundreds of microseconds.
    limit : int
        The greatest number of idle bytes that are kept; beyond it, the least recently used buffer is freed.
    """

    def __init__(self, device: Device, limit: int = 1 << 30) -> None:
        self._device, self._limit = device, limit
        self._idle: OrderedDict[int, tuple[int, Buffer]] = OrderedDict()
        self._handed_out = 0
        self.held = 0
        """The bytes that are kept idle."""

    def array(self, count: int, dtype: DTypeLike) -> np.ndarray:
        """Return an uninitialised flat array of `count` elements in pinned memory."""
        nbytes = count * np.dtype(dtype).itemsize
        size = max(_SMALLEST, 1 << (nbytes - 1).bit_length() if nbytes else 0)
        memory = self._take(size)
        whole = np.frombuffer(memory, np.uint8, size)
        # Views refer to `whole`, not to `memory`: it lives as long as the last of them.
        weakref.finalize(whole, self._put, size, memory).atexit = False
        return whole[:nbytes].view(dtype)

    def _take(self, size: int) -> Buffer:
        for key in reversed(list(self._idle)):  # a copy: a buffer may come back during the loop
            if self._idle[key][0] == size:
                self.held -= size
                return self._idle.pop(key)[1]
        return self._device.pinned(size)

    def _put(self, size: int, memory: Buffer) -> None:
        self._handed_out += 1
        self._idle[self._handed_out] = size, memory
        self.held += size
        while self.held > self._limit:
            _, (freed, _) = self._idle.popitem(last=False)
            self.held -= freed


@functools.cache
def pool(device: Device) -> Pool:
    """Return the pool of this process for the pinned host memory of a device."""
    return Pool(device)


def _carried(buffer: Block) -> Block:
    """Return a buffer in a dtype that MPI knows: 16-bit floats as integers."""
    return buffer.view(np.uint16) if backend.is_half(buffer.dtype) else buffer


def send_buffer(block: Block, grid: Grid) -> Block:
    """Return the flat buffer that MPI reads for a block: its own memory, or a copy in host memory."""
    device = backend.device_of(block)
    if device is None:
        return _carried(np.ascontiguousarray(backend.to_host(block)).reshape(-1))
    if grid.awareness.aware:
        buffer = backend.contiguous(block).reshape(-1)  # may start a kernel: synchronise after it
    else:
        buffer = pool(device).array(block.size, block.dtype)
        device.read(block, buffer.reshape(block.shape))
    device.synchronize()
    return _carried(buffer)


def recv_buffer(block: Block, count: int, grid: Grid) -> Block:
    """Return a flat buffer that MPI can write, of `count` elements of the block's dtype, for `from_buffer`."""
    dtype = backend.numpy_dtype(block.dtype)
    dtype = np.dtype(np.uint16) if backend.is_half(dtype) else dtype
    device = backend.device_of(block)
    if device is None:
        return np.empty(count, dtype)
    if not grid.awareness.aware:
        return pool(device).array(count, dtype)
    buffer = backend.empty_like(block, (count,), dtype)
    device.synchronize()
    return buffer


def from_buffer(buffer: Block, beside: Block) -> Block:
    """Return the contents of a buffer from `recv_buffer` as a flat block on the device of `beside`."""
    if backend.is_half(beside.dtype) and buffer.dtype == np.uint16:
        buffer = buffer.view(backend.numpy_dtype(beside.dtype))
    return buffer if backend.device_of(buffer) else backend.to_block(buffer, beside)
