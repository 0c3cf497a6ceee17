"""Load a checkpoint: verify the files, then read this rank's blocks, whatever grid wrote them.

Training, generation and conversion call `load`. It calls `colossal_mpi.checkpoint.checksums` to verify, h5py to read,
and ``redistribute`` where several ranks need the same bytes. `RankFiles` also serves
`colossal_mpi.checkpoint.inspection`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi import files as disk
from colossal_mpi.checkpoint import checksums
from colossal_mpi.checkpoint.index import SavedBlock, read_index
from colossal_mpi.checkpoint.manifest import ArrayRecord, FileRecord, axes_text, read_manifest, stored_dtype
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, box_shape, intersect, slices
from colossal_mpi.platform import backend

if TYPE_CHECKING:
    import h5py


def load(
    directory: str | Path, arrays: Mapping[str, DistArray], grid: Grid, *, besides: bool = False
) -> dict[str, Any]:
    """Fill arrays in place from a checkpoint that was written on any grid in any layouts.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint, which all ranks can read.
    arrays : mapping of str to DistArray
        The arrays to fill by name. They have the global shapes and dtypes of the checkpoint. They lie on `grid` or on
        this rank's part of it, in any layout without partial sums. All ranks together must name all arrays.
    grid : Grid
        The grid whose ranks load together.
    besides : bool, default False
        Whether the checkpoint may hold other arrays as well, for example an optimizer's state where only weights are
        wanted. They are neither read nor verified.

    Returns
    -------
    dict
        The metadata that was saved.

    Raises
    ------
    CheckpointError
        On all ranks and before any array is touched, if the checkpoint is missing or damaged or holds other arrays. The
        message names the file and the dataset.

    Notes
    -----
    The ranks together read the needed bytes twice, whatever their number: once to verify them, each rank its share, and
    once as blocks, which come from the system's cache on one node. One array at a time may take the memory of its block
    twice.

    **Communication:** small messages, the largest with the boxes of all saved blocks. Where a block is cut along
    columns or has replicas, rows are read and redistributed: each rank receives at most its own block, in words.

    Examples
    --------
    >>> w = zeros((100, 70), grid, Layout("row", "col"))
    >>> metadata = load("runs/x/step-7", {"weights/w": w}, grid)
    """
    directory = Path(directory)
    held = comm.collect([name for name, array in arrays.items() if array.grid.rank == 0], grid)
    wanted = {name for of_rank in held for name in of_rank}
    with comm.agreed(grid, CheckpointError):
        manifest = read_manifest(directory)
        _require_match(directory, manifest["arrays"], arrays, wanted, besides)
        needed = [p for p in checksums.parts_of(manifest["files"]) if p.dataset in wanted or not p.dataset]
        own_share = checksums.share(needed, grid.rank, grid.size)
        checksums.require_undamaged(directory, manifest["files"], own_share)
    index = _shared_index(directory, sorted(wanted), manifest["files"], grid)
    with comm.agreed(grid, CheckpointError):
        _read(directory, {name: arrays[name] for name in sorted(arrays)}, index, manifest["arrays"])
    return manifest["metadata"]


def _require_match(
    directory: Path,
    records: Mapping[str, ArrayRecord],
    arrays: Mapping[str, DistArray],
    wanted: set[str],
    besides: bool,
) -> None:
    missing, surplus = sorted(wanted - set(records)), sorted(set(records) - wanted)
    if missing or (surplus and not besides):
        raise CheckpointError(
            f"{directory} holds other arrays: it lacks {missing[:3] or 'none'} and has {surplus[:3] or 'none'} besides"
        )
    for name, array in arrays.items():
        if array.layout.partial:
            raise CheckpointError(f"{name} is {array.layout}: load into an array without partial sums")
        have = (tuple(records[name]["shape"]), records[name]["dtype"])
        want = (array.shape, str(backend.numpy_dtype(array.dtype)))
        if have != want:
            raise CheckpointError(f"{directory}: {name} is {have[1]}{have[0]} and the model's is {want[1]}{want[0]}")


def _shared_index(
    directory: Path, names: list[str], files: Mapping[str, FileRecord], grid: Grid
) -> dict[str, list[SavedBlock]]:
    """Return the saved blocks of arrays on all ranks. Each rank reads a share: HDF5 needs 60 us for a block."""
    with comm.agreed(grid, CheckpointError):
        own = read_index(directory, names[grid.rank :: grid.size], files)
    return {name: blocks for of_rank in comm.collect(own, grid) for name, blocks in of_rank.items()}


def _read(
    directory: Path,
    arrays: Mapping[str, DistArray],
    index: Mapping[str, list[SavedBlock]],
    records: Mapping[str, ArrayRecord],
) -> None:
    """Fill this rank's blocks. All ranks of an array's grid read the arrays in one order."""
    with RankFiles(directory) as files:
        for name, array in arrays.items():
            if _each_reads_its_own(array, records[name]):
                _read_block(files, array, name, index[name])
            else:
                _read_rows(files, array, name, index[name])


_SMALL = 1 << 16
"""Greatest size in bytes of an array of which every rank reads its own block, whatever the others read."""


def _each_reads_its_own(array: DistArray, record: ArrayRecord) -> bool:
    """Return whether each rank should read its own block; the answer is the same on all ranks.

    It should if no other rank reads the same bytes and the block lies in few places of the files.
    """
    dtype = backend.numpy_dtype(array.dtype)
    if array.size * dtype.itemsize <= _SMALL or stored_dtype(str(dtype)) != dtype:
        return True
    sizes, layout = array.grid.axes, array.layout.on(array.grid.axes, array.ndim)
    alone = all(size == 1 or axis in layout.cut for axis, size in sizes.items())
    as_written = repr(array.layout) == record["layout"] and axes_text(sizes) == record.get("grid")
    return alone and (as_written or not any(layout.dims[1:]))


def _read_block(files: RankFiles, array: DistArray, name: str, blocks: Sequence[SavedBlock]) -> None:
    """Read this rank's block, directly into it if it is a NumPy array in C order."""
    dtype, block = backend.numpy_dtype(array.dtype), array.local
    stored = stored_dtype(str(dtype))
    direct = type(block) is np.ndarray and block.flags.c_contiguous and stored == dtype
    host = block if direct else np.empty(block.shape, stored)
    files.read(name, blocks, array.box, host)
    if not direct:
        block[...] = backend.to_block(host.view(dtype), block)


def _read_rows(files: RankFiles, array: DistArray, name: str, blocks: Sequence[SavedBlock]) -> None:
    """Read rows, which are contiguous in the files, each on one rank, and redistribute them to the array's layout.

    A rank that read its block of columns would also read the bytes between them, which other ranks read as well, and
    every replica would read the same bytes again.
    """
    rows = Layout(tuple(array.grid.axes), *[None] * (array.ndim - 1))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        box = tuple((dim.start, dim.stop) for dim in index)
        host = np.empty(box_shape(box), backend.numpy_dtype(array.dtype))
        files.read(name, blocks, box, host)
        return host

    with comm.agreed(array.grid, CheckpointError):
        part = from_global(read, array.grid, rows, array.shape)
    # A[I_(all axes), ...] -> A[array.layout]: all_to_all, at most the own block received
    array.local[...] = part.redistribute(array.layout).local


class RankFiles:
    """The rank files of a checkpoint, each opened when it is first read. Use it as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._opened = directory, dict[str, "h5py.File"]()

    def read(self, name: str, blocks: Sequence[SavedBlock], box: Box, into: np.ndarray) -> None:
        """Read a box of an array into a NumPy array in C order.

        Parameters
        ----------
        name : str
            The array.
        blocks : sequence of SavedBlock
            The blocks in which it is stored.
        box : Box
            The part of the array to read.
        into : array
            The array that is filled, of the shape of the box.

        Raises
        ------
        CheckpointError
            If a dataset does not agree with the index.
        """
        for block in blocks:
            common = intersect(block.box, box)
            if 0 not in box_shape(common):
                dataset = _plain_dataset(self._file(block.file), name, block)
                dataset.read_direct(into, slices(common, block.box), slices(common, box))

    def _file(self, name: str) -> h5py.File:
        if name not in self._opened:
            try:
                self._opened[name] = disk.open_hdf5(self._directory / name, within=self._directory)
            except OSError as problem:
                raise CheckpointError(f"{self._directory / name} cannot be read: {problem.strerror}") from None
        return self._opened[name]

    def __enter__(self) -> RankFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened.values():
            file.close()


def _plain_dataset(file: h5py.File, name: str, block: SavedBlock) -> h5py.Dataset:
    """Return the dataset of a block, which must lie in this very file: HDF5 can hide other files behind a name."""
    try:
        dataset = disk.find_dataset(file, name)
    except (KeyError, ValueError):
        raise CheckpointError(f"{file.filename} is damaged: {name} is no dataset of this file") from None
    if dataset.shape != box_shape(block.box):
        raise CheckpointError(f"{file.filename} is damaged: {name} is {dataset.shape} and not {box_shape(block.box)}")
    return dataset
