"""Loading a checkpoint: check all, then read this rank's blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.checkpoint import parts
from colossal_mpi.checkpoint.entries import stored, text_of
from colossal_mpi.checkpoint.index import Piece, read_index
from colossal_mpi.checkpoint.manifest import read_manifest
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, box_shape, intersect, slices
from colossal_mpi.platform import backend


def load(
    directory: str | Path, arrays: Mapping[str, DistArray], grid: Grid, *, besides: bool = False
) -> dict[str, Any]:
    """Fill arrays from a checkpoint, in place, whatever grid and layouts it was written with; return its metadata.

    Parameters
    ----------
    directory : path
    arrays : mapping of str to DistArray
        Arrays of the names, global shapes and dtypes in the checkpoint, in any layout on `grid` or on this rank's part
        of it; all ranks together must name all.
    grid : Grid
    besides : bool
        Whether the checkpoint may hold other arrays besides: those of an optimizer, where weights are wanted. They are
        neither read nor verified.

    Raises
    ------
    CheckpointError
        On all ranks, before any array is touched, if the checkpoint is missing, damaged or of other arrays. It names
        the file and the dataset.

    Notes
    -----
    The ranks together read what they need twice, whatever their number: once to verify it, each its share, and once as
    blocks, which on one node comes from the system's cache. One array at a time may take the memory of its block twice.

    **Communication:** small messages, the largest with the places of all pieces; where a block is cut along columns or
    has replicas, the redistribution of an array from rows: at most its block for each rank.
    """
    directory = Path(directory)
    held = comm.collect([name for name, array in arrays.items() if array.grid.rank == 0], grid)
    named = {name for names in held for name in names}
    with comm.agreed(grid, CheckpointError):
        manifest = read_manifest(directory)
        _match(directory, manifest["arrays"], arrays, named, besides)
        needed = [part for part in parts.table(manifest["files"]) if part.name in named or not part.name]
        parts.require(directory, manifest["files"], parts.share(needed, grid.rank, grid.size))
    index = _shared_index(directory, sorted(named), manifest["files"], grid)
    with comm.agreed(grid, CheckpointError):
        _read(directory, {name: arrays[name] for name in sorted(arrays)}, index, manifest["arrays"])
    return manifest["metadata"]


def _match(
    directory: Path, entries: Mapping[str, Any], arrays: Mapping[str, DistArray], named: set[str], besides: bool
) -> None:
    missing, surplus = sorted(named - set(entries)), sorted(set(entries) - named)
    if missing or (surplus and not besides):
        raise CheckpointError(
            f"{directory} holds other arrays: it lacks {missing[:3] or 'none'} and has {surplus[:3] or 'none'} besides"
        )
    for name, array in arrays.items():
        if array.layout.partial:
            raise CheckpointError(f"{name} is {array.layout}: load into an array without partial sums")
        have = (tuple(entries[name]["shape"]), entries[name]["dtype"])
        want = (array.shape, str(backend.numpy_dtype(array.dtype)))
        if have != want:
            raise CheckpointError(f"{directory}: {name} is {have[1]}{have[0]} and the model's is {want[1]}{want[0]}")


def _shared_index(directory: Path, names: list[str], files: Mapping[str, Any], grid: Grid) -> dict[str, list[Piece]]:
    """Return the pieces of arrays on all ranks; each reads of its share of them, since HDF5 takes 60 us for a piece."""
    with comm.agreed(grid, CheckpointError):
        mine = read_index(directory, names[grid.rank :: grid.size], files)
    return {name: pieces for some in comm.collect(mine, grid) for name, pieces in some.items()}


def _read(directory: Path, arrays: Mapping[str, DistArray], index: Mapping[str, list[Piece]], head: Any) -> None:
    """Fill this rank's blocks. The ranks of an array's grid take the arrays in one order."""
    with Files(directory) as files:
        for name, array in arrays.items():
            if _apart(array, head[name]):
                _read_own(files, array, name, index[name])
            else:
                _read_rows(files, array, name, index[name])


_SMALL = 1 << 16
"""Bytes of an array that every rank may read without regard for the others."""


def _apart(array: DistArray, entry: Mapping[str, Any]) -> bool:
    """Say, alike on all ranks, whether each should read its own block: no other reads it, and it lies in few places."""
    dtype = backend.numpy_dtype(array.dtype)
    if array.size * dtype.itemsize <= _SMALL or stored(str(dtype)) != dtype:
        return True
    sizes, layout = array.grid.axes, array.layout.on(array.grid.axes, array.ndim)
    alone = all(size == 1 or axis in layout.cut for axis, size in sizes.items())
    as_written = repr(array.layout) == entry["layout"] and text_of(sizes) == entry.get("grid")
    return alone and (as_written or not any(layout.dims[1:]))


def _read_own(files: Files, array: DistArray, name: str, pieces: Sequence[Piece]) -> None:
    """Read this rank's block, straight into it where NumPy has it in order."""
    dtype, block = backend.numpy_dtype(array.dtype), array.local
    direct = type(block) is np.ndarray and block.flags.c_contiguous and stored(str(dtype)) == dtype
    host = block if direct else np.empty(block.shape, stored(str(dtype)))
    files.read(name, pieces, array.box, host)
    if not direct:
        block[...] = backend.to_block(host.view(dtype), block)


def _read_rows(files: Files, array: DistArray, name: str, pieces: Sequence[Piece]) -> None:
    """Read rows, which lie in order, each on one rank, and send them where they belong.

    A block of columns would read, with what lies between its pieces, what the other ranks read as well, and every
    replica the same again.
    """
    rows = Layout(tuple(array.grid.axes), *[None] * (array.ndim - 1))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        box = tuple((some.start, some.stop) for some in index)
        host = np.empty(box_shape(box), backend.numpy_dtype(array.dtype))
        files.read(name, pieces, box, host)
        return host

    with comm.agreed(array.grid, CheckpointError):
        part = from_global(read, array.grid, rows, array.shape)
    array.local[...] = part.redistribute(array.layout).local


class Files:
    """The rank files of a checkpoint, opened when first needed."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._opened = directory, dict[str, Any]()

    def read(self, name: str, pieces: Sequence[Piece], box: Box, into: np.ndarray) -> None:
        """Read a box of an array into a NumPy array in C order."""
        for piece in pieces:
            common = intersect(piece.box, box)
            if 0 not in box_shape(common):
                dataset = plain(self._file(piece.file), name, piece)
                dataset.read_direct(into, slices(common, piece.box), slices(common, box))

    def _file(self, name: str) -> Any:
        import h5py

        if name not in self._opened:
            self._opened[name] = h5py.File(self._directory / name, "r")
        return self._opened[name]

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._opened.values():
            file.close()


def plain(file: Any, name: str, piece: Piece) -> Any:
    """Return the dataset of a piece, which must lie in this very file: HDF5 can hide other files behind a name.

    Raises
    ------
    CheckpointError
    """
    import h5py

    link = file.get(name, getlink=True)
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise CheckpointError(f"{file.filename} is damaged: {name} is no dataset of this file")
    if dataset.shape != box_shape(piece.box):
        raise CheckpointError(f"{file.filename} is damaged: {name} is {dataset.shape} and not {box_shape(piece.box)}")
    return dataset
