"""Checkpoints: a directory of HDF5 files that any grid, and any HDF5 tool, can read.

==================  ====================================================================================
``rank00003.h5``    the blocks that rank 3 owns; each global element stands in exactly one file
``index.h5``        every array as one plain global dataset (virtual, pointing into the rank files)
``manifest.json``   format version, shape, dtype and layout of every array, what the caller adds, and size
                    and SHA-256 of every file; written last
==================  ====================================================================================

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a directory of its final name is
whole. Checksums are verified before HDF5 parses a file: a flipped bit in its metadata can crash it, and a missing
file under a virtual dataset silently reads as zeros. Single arrays as datasets of one file: `colossal_mpi.hdf5`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import backend, comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid
from colossal_mpi.hdf5 import require_name
from colossal_mpi.layout import Box, Layout, box_shape, coords_of, index_of, rank_of

FORMAT_VERSION = 1
MANIFEST, INDEX = "manifest.json", "index.h5"


def save(directory: str | Path, arrays: Mapping[str, DistArray], metadata: Mapping[str, Any], grid: Grid) -> None:
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

    Raises
    ------
    CheckpointError
        On all ranks, if an array is a partial sum or of another grid, the directory exists or a rank cannot write; no
        directory of the final name is left then.

    Notes
    -----
    **Communication:** small messages only.
    """
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    entries = _entries(arrays, grid)
    head = _head(entries, metadata)
    with comm.agreed(grid, CheckpointError):
        if grid.rank == 0:
            _make(directory, partial)
    with comm.agreed(grid, CheckpointError):
        entry = _write_rank(partial, arrays, grid)
    files = dict(item for item in comm.collect(entry, grid) if item)
    with comm.agreed(grid, CheckpointError):
        if grid.rank == 0:
            _write_index(partial, entries)
            files[INDEX] = _digest(partial / INDEX)
            _write_manifest(partial, head, files)
            flush(partial)
            partial.rename(directory)
            flush(directory.parent)


@dataclass(frozen=True)
class _Entry:
    """An array and the ranks of the whole grid that hold it, in the order of its own grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    axes: dict[str, int]
    ranks: list[int]

    def pieces(self) -> Iterator[tuple[int, Box]]:
        """Yield the ranks that own blocks, and these."""
        for place, rank in enumerate(self.ranks):
            box = self.layout.owned(self.shape, self.axes, coords_of(place, self.axes))
            if box is not None:
                yield rank, box


def _entries(arrays: Mapping[str, DistArray], grid: Grid) -> dict[str, _Entry]:
    """Return the arrays of all ranks by name, checked; the first rank of each array's grid tells of it."""
    with comm.agreed(grid, CheckpointError):
        for name, array in arrays.items():
            _savable(name, array, grid)
    told = [_entry(name, array, grid) for name, array in arrays.items() if array.grid.rank == 0]
    entries = [entry for some in comm.collect(told, grid) for entry in some]
    names = {entry.name: entry for entry in entries}
    if len(names) < len(entries):
        twice = next(entry.name for entry in entries if names[entry.name] is not entry)
        raise CheckpointError(f"{twice} is saved by two parts of the grid: it must come from one of them")
    for name in names:
        parts = name.split("/")
        if any("/".join(parts[:i]) in names for i in range(1, len(parts))):
            raise CheckpointError(f"{name!r} lies under the name of another array: HDF5 cannot hold both")
    return names


def _savable(name: str, array: DistArray, grid: Grid) -> None:
    require_name(name)
    if array.layout.partial:
        raise CheckpointError(f"{name} is {array.layout}: partial sums cannot be saved; redistribute it first")
    if array.grid is not grid and not grid.has(array.grid):
        raise CheckpointError(f"{name} lies on another grid, {array.grid}: save the arrays of one grid at a time")


def _entry(name: str, array: DistArray, grid: Grid) -> _Entry:
    own = array.grid
    ranks = [rank_of({**grid.coords, **own.coords_of(place)}, grid.axes) for place in range(own.size)]
    return _Entry(name, array.shape, str(backend.numpy_dtype(array.dtype)), array.layout, dict(own.axes), ranks)


def _make(directory: Path, partial: Path) -> None:
    if directory.exists():
        raise CheckpointError(
            f"{directory} exists: a checkpoint is never overwritten; choose another name or remove it"
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _rank_file(rank: int) -> str:
    return f"rank{rank:05d}.h5"


def _write_rank(partial: Path, arrays: Mapping[str, DistArray], grid: Grid) -> tuple[str, dict[str, Any]] | None:
    import h5py

    mine = {
        name: array
        for name, array in arrays.items()
        if array.layout.owned(array.shape, array.grid.axes, array.grid.coords) is not None
    }
    if not mine:
        return None
    path = partial / _rank_file(grid.rank)
    with h5py.File(path, "w", libver="v110") as file:
        for name, array in mine.items():
            file.create_dataset(name, data=backend.to_host(array.local))
    flush(path)
    return path.name, _digest(path)


def _write_index(partial: Path, entries: Mapping[str, _Entry]) -> None:
    import h5py

    with h5py.File(partial / INDEX, "w", libver="v110") as file:
        for name, entry in entries.items():
            whole = h5py.VirtualLayout(entry.shape, np.dtype(entry.dtype))
            for rank, box in entry.pieces():
                whole[index_of(box)] = h5py.VirtualSource(_rank_file(rank), name, box_shape(box))
            dataset = file.create_virtual_dataset(name, whole)
            dataset.attrs["layout"] = repr(entry.layout)
            dataset.attrs["grid"] = ", ".join(f"{axis}={size}" for axis, size in entry.axes.items())
    flush(partial / INDEX)


def _head(entries: Mapping[str, _Entry], metadata: Mapping[str, Any]) -> str:
    arrays = {name: {"shape": e.shape, "dtype": e.dtype, "layout": repr(e.layout)} for name, e in entries.items()}
    try:
        return json.dumps({"format_version": FORMAT_VERSION, "metadata": metadata, "arrays": arrays})
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"the metadata cannot be written as JSON: {problem}") from None


def _write_manifest(partial: Path, head: str, files: Mapping[str, Any]) -> None:
    path = partial / MANIFEST
    path.write_text(json.dumps(json.loads(head) | {"files": files}, indent=1))
    flush(path)


def point_latest(directory: str | Path) -> None:
    """Make the link ``latest`` beside a checkpoint point to it, in one step. Call it on one rank."""
    directory = Path(directory)
    link = directory.parent / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    os.replace(link, directory.parent / "latest")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises
    ------
    CheckpointError
        If there is none, or it is of a format that this version cannot read.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except OSError:
        raise CheckpointError(f"no checkpoint at {Path(directory)}: {MANIFEST} is missing or unreadable") from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is no JSON") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r}; this version of colossal_mpi reads {FORMAT_VERSION}"
        )
    return manifest


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
        Whether the checkpoint may hold other arrays besides: those of an optimizer, where weights are wanted.

    Raises
    ------
    CheckpointError
        On all ranks, before any array is touched, if the checkpoint is missing, damaged or of other arrays.

    Notes
    -----
    **Communication:** small messages only; each rank reads its own blocks.
    """
    directory = Path(directory)
    held = comm.collect([name for name, array in arrays.items() if array.grid.rank == 0], grid)
    named = {name for names in held for name in names}
    with comm.agreed(grid, CheckpointError):
        manifest = read_manifest(directory)
        _match(directory, manifest["arrays"], arrays, named, besides)
        for name in sorted(manifest["files"])[grid.rank :: grid.size]:
            _verify(directory, name, manifest["files"][name])
    with comm.agreed(grid, CheckpointError):
        _read(directory, arrays, manifest["files"])
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


def _verify(directory: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = directory / name
    if Path(name).name != name or not path.is_file():
        raise CheckpointError(f"{directory} is damaged: {name} is missing")
    if _digest(path) != expected:
        raise CheckpointError(f"{directory} is damaged: {name} is not the file that was written (SHA-256 differs)")


def _read(directory: Path, arrays: Mapping[str, DistArray], files: Mapping[str, Any]) -> None:
    import h5py

    with h5py.File(directory / INDEX, "r") as file:
        needed = {source.file_name for name in arrays for source in file[name].virtual_sources()}
        if not needed <= set(files):
            raise CheckpointError(f"{directory} is damaged: {INDEX} needs {sorted(needed - set(files))}")
        for name, array in arrays.items():
            host = np.asarray(file[name][index_of(array.box)])
            array.local[...] = backend.to_block(host, array.local)
