"""Save a checkpoint: each rank writes its blocks, then rank 0 describes them and gives the directory its name.

`save` does all steps at once. `colossal_mpi.checkpoint.async_checkpointer` runs the steps of `CheckpointWriter` that do
not communicate on a thread. The module calls ``comm`` so that all ranks agree on the arrays and on failures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from colossal_mpi import comm
from colossal_mpi import files as disk
from colossal_mpi.checkpoint import checksums, directory, rank_file
from colossal_mpi.checkpoint.hdf5 import NUMBERS, require_name
from colossal_mpi.checkpoint.index import write_index
from colossal_mpi.checkpoint.manifest import (
    FileRecord,
    SavedArray,
    ValueRecord,
    is_stored_as_bits,
    manifest_head,
    write_manifest,
)
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, ColossalError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import rank_of
from colossal_mpi.platform import Block, backend

WrittenFile: TypeAlias = tuple[str, FileRecord]
"""Name and record of the file that a rank has written."""


def save(
    directory: str | Path,
    arrays: Mapping[str, DistArray],
    metadata: Mapping[str, Any],
    grid: Grid,
    *,
    values: Mapping[str, tuple[Any, str]] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write arrays and metadata as a new checkpoint.

    Parameters
    ----------
    directory : str or Path
        The new directory; it must not exist. Its parents are created.
    arrays : mapping of str to DistArray
        The arrays by name, of any dtype that HDF5 has a type for, or bfloat16. They lie on `grid` or on this rank's
        part of it (``grid.at(pipe=1)``), each name on one part, in any layout without partial sums. A ``/`` in a name
        makes HDF5 groups.
    metadata : mapping
        Anything that JSON can hold. `load` returns it.
    grid : Grid
        The grid whose ranks save together.
    values : mapping of str to (value, units), optional
        Numbers, texts and lists of numbers that stand beside the arrays in ``index.h5``, for other tools; the same on
        all ranks. `read_manifest` returns them.
    files : mapping of str to bytes, optional
        Further files by name, such as ``tokenizer.json``, that the directory holds beside the arrays. Rank 0 writes
        them, and those of other ranks are ignored. The manifest has their checksums.

    Raises
    ------
    CheckpointError
        On all ranks, if an array is a partial sum or lies on another grid, if the directory exists, or if a rank cannot
        write. No directory of the final name is left then.

    Notes
    -----
    A block in host memory is not copied unless it is not in C order; such blocks are copied one at a time.

    **Communication:** small messages only: names, shapes and checksums.

    Examples
    --------
    >>> save("runs/x/step-7", {"weights/w": w}, {"step": 7}, grid, values={"step": (7, "1")})
    """
    writer = CheckpointWriter(Path(directory), arrays, metadata, grid, values or {}, files or {})
    try:
        with comm.agreed(grid, CheckpointError):
            written = writer.write(writer.blocks())
        all_written = comm.collect(written, grid)
        with comm.agreed(grid, CheckpointError):
            writer.publish(all_written)
    except ColossalError:
        writer.discard()
        raise


def owned_bytes(arrays: Mapping[str, DistArray]) -> int:
    """Return how many bytes this rank writes when some arrays are saved.

    Parameters
    ----------
    arrays : mapping of str to DistArray
        The arrays by name, as `save` takes them.

    Returns
    -------
    int
        The size of the blocks that this rank owns, in bytes. A replicated block has one owner.
    """
    return sum(array.local.nbytes for array in arrays.values() if owned(array))


def owned(array: DistArray) -> bool:
    """Return whether this rank writes its block of an array."""
    return array.layout.owned(array.shape, array.grid.axes, array.grid.coords) is not None


class CheckpointWriter:
    """The steps of saving one checkpoint; some communicate, and the others may run on a thread.

    The constructor is collective: it checks what is to be saved and creates the directory. `write` and `publish` do not
    communicate and may run on a thread. Between them the caller collects the results of `write` from all ranks.

    Raises
    ------
    CheckpointError
        On all ranks, if the arrays, values or metadata cannot be saved or the directory exists.
    """

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, DistArray],
        metadata: Mapping[str, Any],
        grid: Grid,
        values: Mapping[str, tuple[Any, str]],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.directory, self.grid, self._files = path, grid, dict(files or {})
        self._owned = {name: array for name, array in arrays.items() if owned(array)}
        self._arrays = _collect_arrays(arrays, grid)
        _require_names(values, self._arrays)
        records = {name: ValueRecord(value=value, units=units) for name, (value, units) in values.items()}
        self._head = manifest_head(self._arrays, metadata, records)
        with comm.agreed(grid, CheckpointError):
            if grid.rank == 0:
                _require_file_names(self._files)
                directory.create(path)

    def blocks(self) -> dict[str, Block]:
        """Return the blocks that this rank writes, by name."""
        return {name: array.local for name, array in self._owned.items()}

    def write(self, blocks: Mapping[str, Block]) -> WrittenFile | None:
        """Write this rank's blocks, or copies of them, to the disk; return None if it owns none."""
        if not blocks:
            return None
        path = directory.partial_directory(self.directory) / directory.rank_file_name(self.grid.rank)
        return path.name, rank_file.write_rank_file(path, blocks)

    def publish(self, written: list[WrittenFile | None], after: Callable[[], None] | None = None) -> None:
        """Write index and manifest, rename the directory, then call `after`; only rank 0 does something."""
        if self.grid.rank != 0:
            return
        partial = directory.partial_directory(self.directory)
        try:
            for name, content in self._files.items():
                disk.write_new(partial / name, content)
            write_index(partial, self._arrays, self._head)
            files = dict(file for file in written if file)
            for name in (*self._files, directory.INDEX):
                files[name] = checksums.single_part(partial / name)
            write_manifest(partial, {**self._head, "files": files})
            directory.publish(self.directory)
        except (OSError, RuntimeError) as problem:
            raise directory.write_error(self.directory, problem) from problem
        if after is not None:
            after()

    def discard(self) -> None:
        """Remove the written files after a failure, without communication; only rank 0 does something."""
        if self.grid.rank == 0:
            directory.discard(self.directory)


def _collect_arrays(arrays: Mapping[str, DistArray], grid: Grid) -> dict[str, SavedArray]:
    """Check the arrays of all ranks and return them by name; the first rank of each array's grid describes it."""
    with comm.agreed(grid, CheckpointError):
        for name, array in arrays.items():
            _require_savable(name, array, grid)
    described = [_describe(name, array, grid) for name, array in arrays.items() if array.grid.rank == 0]
    entries = [entry for of_rank in comm.collect(described, grid) for entry in of_rank]
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) < len(entries):
        twice = next(entry.name for entry in entries if by_name[entry.name] is not entry)
        raise CheckpointError(f"{twice} is saved by two parts of the grid: it must come from one of them")
    _require_tree(by_name)
    return by_name


def _require_savable(name: str, array: DistArray, grid: Grid) -> None:
    require_name(name)
    if array.layout.partial:
        raise CheckpointError(f"{name} is {array.layout}: partial sums cannot be saved; redistribute it first")
    if array.grid is not grid and not grid.has_subgrid(array.grid):
        raise CheckpointError(f"{name} lies on another grid, {array.grid}: save the arrays of one grid at a time")
    dtype = backend.numpy_dtype(array.dtype)
    if not is_stored_as_bits(dtype.name) and dtype.kind not in NUMBERS:
        raise CheckpointError(f"{name} is of dtype {dtype}, which HDF5 has no type for: cast it with .astype first")


def _describe(name: str, array: DistArray, grid: Grid) -> SavedArray:
    own = array.grid
    ranks = [rank_of({**grid.coords, **own.coords_of(place)}, grid.axes) for place in range(own.size)]
    return SavedArray(name, array.shape, str(backend.numpy_dtype(array.dtype)), array.layout, dict(own.axes), ranks)


def _require_names(values: Mapping[str, object], arrays: Mapping[str, object]) -> None:
    for name in values:
        require_name(name)
        if name in arrays:
            raise CheckpointError(f"{name!r} names an array and a value: give one of them another name")
    _require_tree({**arrays, **values})


def _require_file_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        if Path(name).name != name or name == directory.MANIFEST or name.endswith(".h5"):
            raise CheckpointError(
                f"{name!r} cannot stand beside the arrays: use a plain name other than {directory.MANIFEST} and *.h5"
            )


def _require_tree(names: Mapping[str, object]) -> None:
    """Raise an error if one name lies under another."""
    for name in names:
        parts = name.split("/")
        if any("/".join(parts[:i]) in names for i in range(1, len(parts))):
            raise CheckpointError(f"{name!r} lies under the name of another array: HDF5 cannot hold both")
