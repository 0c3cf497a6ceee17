"""Saving a checkpoint: each rank writes its blocks, then rank 0 writes what describes them and gives it its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from colossal_mpi import comm
from colossal_mpi.checkpoint import entries, manifest, parts, place, shard
from colossal_mpi.checkpoint.hdf5 import require_name
from colossal_mpi.checkpoint.index import write_index
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, ColossalError
from colossal_mpi.grid import Grid

Told = tuple[str, dict[str, Any]]
"""The file that a rank has written, and what the manifest says of it."""


def save(
    directory: str | Path,
    arrays: Mapping[str, DistArray],
    metadata: Mapping[str, Any],
    grid: Grid,
    *,
    values: Mapping[str, tuple[Any, str]] | None = None,
) -> None:
    """Write arrays and metadata as a new checkpoint.

    Parameters
    ----------
    directory : path
        Must not exist; its parent is made.
    arrays : mapping of str to DistArray
        On `grid`, or on this rank's part of it (``grid.at(pipe=1)``), each name on one; without partial sums. ``/`` in
        a name makes HDF5 groups.
    metadata : mapping
        Anything that JSON holds.
    grid : Grid
    values : mapping of str to (value, units), optional
        Numbers, texts and lists of numbers that stand beside the arrays in the index, for other tools; the same on all
        ranks. `read_manifest` has them.

    Raises
    ------
    CheckpointError
        On all ranks, if an array is a partial sum or of another grid, the directory exists or a rank cannot write; no
        directory of the final name is left then.

    Notes
    -----
    No block in host memory is copied, except those that are not in C order, one at a time.

    **Communication:** small messages only.
    """
    writing = Writing(Path(directory), arrays, metadata, grid, values or {})
    told: list[Told | None] = []
    try:
        with comm.agreed(grid, CheckpointError):
            mine = writing.write(writing.blocks())
        told = comm.collect(mine, grid)
        with comm.agreed(grid, CheckpointError):
            writing.close(told)
    except ColossalError:
        writing.discard()
        raise


class Writing:
    """A checkpoint on its way to the disk, in steps that communicate and steps that do not.

    Making one is collective: it checks what is to be saved, and makes the directory. `write` and `close` communicate
    nothing, so that they may run on a thread of their own; between them all ranks' results of `write` are collected.

    Raises
    ------
    CheckpointError
        On all ranks.
    """

    def __init__(
        self,
        directory: Path,
        arrays: Mapping[str, DistArray],
        metadata: Mapping[str, Any],
        grid: Grid,
        values: Mapping[str, tuple[Any, str]],
    ) -> None:
        self.directory, self.grid = directory, grid
        self._arrays = {name: array for name, array in arrays.items() if entries.owned(array)}
        self._entries = entries.gather(arrays, grid)
        _require_names(values, self._entries)
        named = {name: {"value": value, "units": units} for name, (value, units) in values.items()}
        self._head = manifest.head(self._entries, metadata, named)
        with comm.agreed(grid, CheckpointError):
            if grid.rank == 0:
                place.make(directory)

    def blocks(self) -> dict[str, Any]:
        """Return the blocks that this rank writes, by name."""
        return {name: array.local for name, array in self._arrays.items()}

    def write(self, blocks: Mapping[str, Any]) -> Told | None:
        """Write this rank's blocks, or copies of them, to the disk. Local."""
        if not blocks:
            return None
        path = place.partial_name(self.directory) / place.rank_file(self.grid.rank)
        return path.name, shard.write(path, blocks)

    def close(self, told: list[Told | None], after: Callable[[], None] | None = None) -> None:
        """Make the checkpoint whole, then do what comes `after`. Local; only rank 0 does something."""
        if self.grid.rank != 0:
            return
        try:
            self._describe(place.partial_name(self.directory), told)
            place.settle(self.directory)
        except (OSError, RuntimeError) as problem:
            raise place.unwritable(self.directory, problem) from problem
        if after is not None:
            after()

    def _describe(self, partial: Path, told: list[Told | None]) -> None:
        write_index(partial, self._entries, self._head)
        files = dict(item for item in told if item) | {place.INDEX: parts.whole(partial / place.INDEX)}
        manifest.write_manifest(partial, self._head | {"files": files})

    def discard(self) -> None:
        """Remove what was written, after a failure. Local; only rank 0 does something."""
        if self.grid.rank == 0:
            place.discard(self.directory)


def _require_names(values: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    for name in values:
        require_name(name)
        if name in arrays:
            raise CheckpointError(f"{name!r} names an array and a value: give one of them another name")
    entries.require_tree({**arrays, **values})
