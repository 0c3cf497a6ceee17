"""The file of one rank: HDF5 lays it out, and the blocks go to their places in it past the library.

So checksums are made from memory while the blocks are written, no byte is read again, and a full disk is an error of
``write`` and not of HDF5, which can crash when it closes a file that it could not write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi.checkpoint.entries import stored
from colossal_mpi.checkpoint.parts import checksum, checksum_of, cover
from colossal_mpi.checkpoint.place import flush, unwritable
from colossal_mpi.platform import backend

_SMALL = 1 << 16  # bytes below which a thread costs more than it saves

Parts = list[list[Any]]
"""Offset, bytes, checksum and dataset of each part, as the manifest has them."""


def write(path: Path, blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Write blocks as the datasets of a new file, on the disk on return; return its size and its parts.

    Raises
    ------
    CheckpointError
        If it cannot be written.
    """
    try:
        offsets = _lay_out(path, blocks)
        descriptor = os.open(path, os.O_RDWR)
        try:
            parts = _fill(descriptor, blocks, offsets)
            size = os.fstat(descriptor).st_size
            parts += _between(descriptor, parts, size)
        finally:
            os.close(descriptor)
        flush(path)
    except (OSError, RuntimeError) as problem:
        raise unwritable(path, problem, sum(block.nbytes for block in map(_bytes_of, blocks.values()))) from problem
    return {"bytes": size, "parts": sorted(parts)}


def _lay_out(path: Path, blocks: Mapping[str, Any]) -> dict[str, int]:
    """Make the file with a place for each block; return where each begins."""
    import h5py

    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)  # the same state is the same file
    with h5py.File(path, "w", libver="v110") as file:
        made = {name: _dataset(h5py, file, name, block, plan) for name, block in blocks.items()}
        return {name: dataset.get_offset() for name, dataset in made.items()}


def _dataset(h5py: Any, file: Any, name: str, block: Any, plan: Any) -> Any:
    group, _, last = name.rpartition("/")
    parent = file.require_group(group) if group else file
    dtype = h5py.h5t.py_create(stored(str(backend.numpy_dtype(block.dtype))), logical=True)
    return h5py.h5d.create(parent.id, last.encode(), dtype, h5py.h5s.create_simple(tuple(block.shape)), plan)


def _bytes_of(block: Any) -> memoryview:
    """Return a block's bytes on the host, without a copy where they are there in order."""
    return np.ascontiguousarray(backend.to_host(block)).reshape(-1).view(np.uint8).data


def _fill(descriptor: int, blocks: Mapping[str, Any], offsets: Mapping[str, int]) -> Parts:
    parts: Parts = []
    with ThreadPoolExecutor(1) as hasher:
        for name, block in blocks.items():
            flat = _bytes_of(block)
            hashes = []
            for start, size in cover(offsets[name], flat.nbytes):
                piece = flat[start - offsets[name] :][:size]
                later = hasher.submit(checksum, piece) if size > _SMALL else None
                _write(descriptor, piece, start)
                hashes.append((start, size, later, piece))
            for start, size, later, piece in hashes:
                parts.append([start, size, later.result() if later else checksum(piece), name])
    return parts


def _write(descriptor: int, piece: memoryview, offset: int) -> None:
    begun, left = offset, piece
    while left.nbytes:
        done = os.pwrite(descriptor, left, offset)
        offset, left = offset + done, left[done:]
    if piece.nbytes > _SMALL and hasattr(os, "posix_fadvise"):
        # Linux begins to write out what is dirty: else the disk would idle until fsync.
        os.posix_fadvise(descriptor, begun, piece.nbytes, os.POSIX_FADV_DONTNEED)


def _between(descriptor: int, parts: Parts, size: int) -> Parts:
    """Return the parts that hold what HDF5 has written, between the blocks."""
    found, at = [], 0
    for start, length, *_ in [*sorted(parts), [size, 0]]:
        if start > at:
            found.append([at, start - at, checksum_of(descriptor, at, start - at), ""])
        at = start + length
    return found
