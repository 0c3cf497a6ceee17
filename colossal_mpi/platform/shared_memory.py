"""Memory that the other ranks of a node can read in place, so that a neighbour's block need not be copied.

Grids allocate large blocks with `empty`. ``comm`` decides which rank reads whose block and when, and calls `lend`,
`describe` and `view`. Each process has one arena: an anonymous file in memory (``memfd_create``) with the size of the
machine's memory, of which only the written pages exist. Large blocks are allocated in it, and a neighbour maps it
through ``/proc``. On a system without such files, blocks lie in ordinary memory and nothing is shared.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import secrets
import threading
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Memory: TypeAlias = mmap.mmap
"""The arena of another process, mapped for reading."""
LEAST = 1 << 20
"""Least size of a block that is allocated in the arena, in bytes."""
_PAGE = 1 << 16
_LARGEST = 1 << 38  # bytes of an arena: each rank of a node maps the arenas of all, into 47 bits of addresses
_KEEP = 1 << 30  # bytes of free memory beyond which all of it is returned to the system


class Arena:
    """The memory of this process that others can read, with a list of free spans by offset; neighbours are merged."""

    def __init__(self) -> None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.size = min(memory, _LARGEST) // _PAGE * _PAGE
        self.file = os.memfd_create("colossal_mpi")
        os.ftruncate(self.file, self.size)
        self._map = mmap.mmap(self.file, self.size)
        self.key = secrets.token_bytes(16)
        self._map[: len(self.key)] = self.key
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._free = [(_PAGE, self.size - _PAGE)]
        self._kept = 0
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def take(self, nbytes: int) -> Span | None:
        """Allocate the first free span that is long enough; return None if there is none."""
        need = -(-max(nbytes, 1) // _PAGE) * _PAGE
        with self._lock:
            self._settle()
            for i, (offset, length) in enumerate(self._free):
                if length >= need:
                    self._free[i : i + 1] = [(offset + need, length - need)] if length > need else []
                    self._kept = max(0, self._kept - need)
                    return Span(self, offset, need, self._address + offset)
        return None

    def give_back(self, offset: int, length: int) -> None:
        """Free a span now or, if the garbage collector calls this during `take`, with the next call."""
        if os.getpid() != self._process:
            return  # a forked child shares the pages with its parent, which still uses them
        self._returned.append((offset, length))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while self._returned:
            span = self._returned.popleft()
            insort(self._free, span)
            i = self._free.index(span)
            low, high = max(0, i - 1), i + 2
            self._free[low:high] = _merge(self._free[low:high])
            self._kept += span[1]
        if self._kept > _KEEP:
            for offset, length in self._free:
                self._map.madvise(mmap.MADV_REMOVE, offset, length)
            self._kept = 0

    def offset(self, block: np.ndarray) -> int | None:
        """Return the offset of a block in the arena, None if it lies elsewhere."""
        start: int = block.__array_interface__["data"][0] - self._address
        return start if 0 <= start < self.size else None


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged = spans[:1]
    for offset, length in spans[1:]:
        last, before = merged[-1]
        if last + before == offset:
            merged[-1] = (last, before + length)
        else:
            merged.append((offset, length))
    return merged


class Span:
    """Memory of an arena for one array and its views; it is freed when the last of them is deleted."""

    def __init__(self, arena: Arena, offset: int, length: int, address: int) -> None:
        self._arena, self._offset, self._length = arena, offset, length
        self.__array_interface__ = {"data": (address, False), "shape": (length,), "typestr": "|u1", "version": 3}

    def array(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Return this memory as an array, which keeps it allocated."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        array: np.ndarray = np.asarray(self)[:nbytes].view(dtype).reshape(tuple(shape))
        return array

    def __del__(self) -> None:
        self._arena.give_back(self._offset, self._length)


@functools.cache
def arena() -> Arena | None:
    """Return the arena of this process, None if the system does not allow one."""
    try:
        return Arena()
    except (AttributeError, OSError, ValueError):  # no memfd, a limit on address space
        return None


def wanted() -> bool:
    """Return whether memory is shared, unless the user has turned it off by ``COLOSSAL_MPI_SHARED=0``."""
    return os.environ.get("COLOSSAL_MPI_SHARED") != "0"


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return an uninitialised array, which lies in the arena if it has at least `LEAST` bytes."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    own = arena() if nbytes >= LEAST else None
    span = own.take(nbytes) if own else None
    return np.empty(shape, dtype) if span is None else span.array(shape, dtype)


if hasattr(os, "register_at_fork"):
    # A child shares the pages of the arena and must not allocate them a second time.
    os.register_at_fork(after_in_child=arena.cache_clear)


@dataclass(frozen=True)
class Address:
    """The address of this process's arena, by which another process of the node can map it."""

    process: int
    file: int
    size: int
    key: bytes


def address() -> Address | None:
    """Return the address of this process's arena."""
    own = arena()
    return Address(os.getpid(), own.file, own.size, own.key) if own else None


@functools.cache
def mapped(where: Address) -> Memory | None:
    """Return the arena of another process, mapped for reading; None if this process cannot map it."""
    try:
        file = os.open(f"/proc/{where.process}/fd/{where.file}", os.O_RDONLY)
    except OSError:  # another container, no /proc
        return None
    try:
        memory = mmap.mmap(file, where.size, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return memory if memory[: len(where.key)] == where.key else None


def lend(block: np.ndarray) -> np.ndarray:
    """Return a block that others can read: the block itself, or a copy in the arena if there is room."""
    if describe(block)[0] >= 0:
        return block
    own = arena()
    span = own.take(block.nbytes) if own else None
    if span is None:
        return block
    copy = span.array(block.shape, block.dtype)
    copy[...] = block
    return copy


def describe(block: np.ndarray) -> list[int]:
    """Return a block's offset in the arena (-1 if it lies elsewhere) and its strides, in bytes, for `view`."""
    own = arena()
    start = own.offset(block) if own and min(block.strides, default=0) >= 0 else None
    return [-1 if start is None else start, *block.strides]


def view(memory: Memory, shape: Sequence[int], dtype: Any, described: Sequence[int]) -> np.ndarray:
    """Return a read-only array of a block of another process, which `describe` has described there."""
    offset, *strides = described
    return np.ndarray(tuple(shape), dtype, buffer=memory, offset=offset, strides=tuple(strides))
