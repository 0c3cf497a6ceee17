"""What a checkpoint holds: its arrays box by box, without distributed arrays to fill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.checkpoint import parts
from colossal_mpi.checkpoint.entries import BITS, stored
from colossal_mpi.checkpoint.index import read_index
from colossal_mpi.checkpoint.loading import Files
from colossal_mpi.checkpoint.manifest import read_manifest
from colossal_mpi.checkpoint.place import INDEX
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, box_shape

_SLAB = 1 << 23
"""Bytes of a box that is read at once."""


def size_of(entry: dict[str, Any]) -> int:
    """Return the bytes of an array of a manifest."""
    return math.prod(entry["shape"]) * stored(entry["dtype"]).itemsize


def missing(directory: Path, files: dict[str, Any]) -> list[str]:
    """Say which files are missing or of another size, in a line each; no checksum is made."""
    return list(parts.damage(directory, files, [parts.Part(name, 0, 0, parts.digest(b"")) for name in sorted(files)]))


def verify(directory: Path, grid: Grid) -> list[str]:
    """Return what is wrong with a checkpoint, in a line each, on all ranks; each reads its share of the bytes.

    Raises
    ------
    CheckpointError
        If the manifest is missing, damaged or of a newer format.

    Notes
    -----
    **Communication:** small messages only.
    """
    files = read_manifest(directory)["files"]
    found = parts.damage(directory, files, parts.share(parts.table(files), grid.rank, grid.size))
    lines = [line for some in comm.collect(list(found), grid) for line in some]
    return list(dict.fromkeys(lines))  # of a missing file each rank tells that has a part of it


class Reader:
    """An open checkpoint. Its index is verified, and files only as far as HDF5 does it: see `verify`.

    Raises
    ------
    CheckpointError
        If the manifest or the index is damaged, or a file is missing or of another size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        files = self.manifest["files"]
        structure = [part for part in parts.table(files) if part.file == INDEX or not part.name]
        parts.require(directory, files, structure)
        self.entries: dict[str, Any] = self.manifest["arrays"]
        self._index = read_index(directory, list(self.entries), files)
        self._files = Files(directory)

    def boxes(self, name: str) -> Iterator[Box]:
        """Yield boxes that tile an array, of at most 8 MiB unless a row is more."""
        shape = tuple(self.entries[name]["shape"])
        if not shape or 0 in shape:
            yield from [()] if not shape else []
            return
        rows = max(1, _SLAB * shape[0] // max(1, size_of(self.entries[name])))
        for start in range(0, shape[0], rows):
            yield ((start, min(start + rows, shape[0])), *((0, n) for n in shape[1:]))

    def read(self, name: str, box: Box) -> np.ndarray:
        """Return a box of an array; bfloat16 as float32."""
        dtype = self.entries[name]["dtype"]
        values = np.empty(box_shape(box), stored(dtype))
        self._files.read(name, self._index[name], box, values)
        return _widened(values) if dtype in BITS else values

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.__exit__()


def _widened(bits: np.ndarray) -> np.ndarray:
    """Return what 16 bits of bfloat16 are in float32: the upper half of it."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
