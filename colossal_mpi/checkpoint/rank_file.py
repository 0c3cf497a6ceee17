"""The file of one rank: HDF5 lays it out, then the blocks are written to their places without the library.

`colossal_mpi.checkpoint.saving` calls `write_rank_file`. The bytes do not pass through HDF5, so that the checksums are
made from memory during the writing and no byte is read again. A full disk is then an error of ``write`` and not of
HDF5, which can crash when it closes a file that it could not write.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colossal_mpi.checkpoint.checksums import checksum, checksum_of_range, split
from colossal_mpi.checkpoint.directory import flush, write_error
from colossal_mpi.checkpoint.manifest import FileRecord, PartRecord, stored_dtype
from colossal_mpi.files import new_hdf5
from colossal_mpi.platform import Block, backend

if TYPE_CHECKING:
    import h5py

_SMALL = 1 << 16  # bytes; below this size a thread costs more than it saves


def write_rank_file(path: Path, blocks: Mapping[str, Block]) -> FileRecord:
    """Write blocks as the datasets of a new file, flush it to the disk and return its record for the manifest.

    Raises
    ------
    CheckpointError
        If the file cannot be written.
    """
    try:
        offsets = _lay_out(path, blocks)
        descriptor = os.open(path, os.O_RDWR)
        try:
            parts = _write_blocks(descriptor, blocks, offsets)
            size = os.fstat(descriptor).st_size
            parts += _parts_between(descriptor, parts, size)
        finally:
            os.close(descriptor)
        flush(path)
    except (OSError, RuntimeError) as problem:
        raise write_error(path, problem, sum(block.nbytes for block in map(_bytes_of, blocks.values()))) from problem
    return {"bytes": size, "parts": sorted(parts)}


def _lay_out(path: Path, blocks: Mapping[str, Block]) -> dict[str, int]:
    """Create the file with an unwritten dataset for each block; return the offset of each, in bytes."""
    import h5py

    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # equal states give equal files
    with new_hdf5(path) as file:
        datasets = {name: _create_dataset(file, name, block, properties) for name, block in blocks.items()}
        return {name: dataset.get_offset() for name, dataset in datasets.items()}


def _create_dataset(file: h5py.File, name: str, block: Block, properties: h5py.h5p.PropDCID) -> h5py.h5d.DatasetID:
    import h5py

    group, _, last = name.rpartition("/")
    parent = file.require_group(group) if group else file
    dtype = h5py.h5t.py_create(stored_dtype(str(backend.numpy_dtype(block.dtype))), logical=True)
    return h5py.h5d.create(parent.id, last.encode(), dtype, h5py.h5s.create_simple(tuple(block.shape)), properties)


def _bytes_of(block: Block) -> memoryview:
    """Return the bytes of a block, without a copy if it lies in host memory in C order."""
    return np.ascontiguousarray(backend.to_host(block)).reshape(-1).view(np.uint8).data


def _write_blocks(descriptor: int, blocks: Mapping[str, Block], offsets: Mapping[str, int]) -> list[PartRecord]:
    """Write each block at its offset, while a thread makes the checksums; return the parts."""
    parts: list[PartRecord] = []
    with ThreadPoolExecutor(1) as hasher:
        for name, block in blocks.items():
            flat = _bytes_of(block)
            written = []
            for start, size in split(offsets[name], flat.nbytes):
                buffer = flat[start - offsets[name] :][:size]
                pending = hasher.submit(checksum, buffer) if size > _SMALL else None
                _write(descriptor, buffer, start)
                written.append((start, size, pending, buffer))
            for start, size, pending, buffer in written:
                parts.append((start, size, pending.result() if pending else checksum(buffer), name))
    return parts


def _write(descriptor: int, buffer: memoryview, offset: int) -> None:
    begun, left = offset, buffer
    while left.nbytes:
        done = os.pwrite(descriptor, left, offset)
        offset, left = offset + done, left[done:]
    if buffer.nbytes > _SMALL and hasattr(os, "posix_fadvise"):
        # Linux begins to write dirty pages out; otherwise the disk would idle until fsync.
        os.posix_fadvise(descriptor, begun, buffer.nbytes, os.POSIX_FADV_DONTNEED)


def _parts_between(descriptor: int, parts: list[PartRecord], size: int) -> list[PartRecord]:
    """Return the parts that HDF5 wrote: all bytes of the file that no block covers."""
    between: list[PartRecord] = []
    end = 0
    for start, length, *_ in [*sorted(parts), (size, 0, "", "")]:
        if start > end:
            between.append((end, start - end, checksum_of_range(descriptor, end, start - end) or "", ""))
        end = start + length
    return between
