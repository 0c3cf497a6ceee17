"""``index.h5``: every array as one global dataset, for any HDF5 tool and for loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi.checkpoint.entries import Entry, stored
from colossal_mpi.checkpoint.place import INDEX, flush, rank_file
from colossal_mpi.errors import CheckpointError
from colossal_mpi.layout import Box, box_shape, index_of


def write_index(directory: Path, entries: Mapping[str, Entry], table: Mapping[str, Any]) -> None:
    """Write the index of a checkpoint whose manifest is `table` to the disk."""
    import h5py

    with h5py.File(directory / INDEX, "w", libver="v110") as file:
        file.attrs["format_version"] = table["format_version"]
        for name, value in table["values"].items():
            dataset = file.create_dataset(name, data=value["value"])
            dataset.attrs["units"] = value["units"]
        for entry in entries.values():
            _add(h5py, file, entry)
    flush(directory / INDEX)


def _add(h5py: Any, file: Any, entry: Entry) -> None:
    whole = h5py.VirtualLayout(entry.shape, stored(entry.dtype))
    for rank, box in entry.pieces():
        whole[index_of(box)] = h5py.VirtualSource(rank_file(rank), entry.name, box_shape(box))
    dataset = file.create_virtual_dataset(entry.name, whole)
    dataset.attrs["shape"] = np.array(entry.shape, np.int64)
    dataset.attrs["dtype"] = entry.dtype
    dataset.attrs["layout"] = repr(entry.layout)
    dataset.attrs["grid"] = entry.grid
    dataset.attrs["units"] = "1"  # as UDUNITS and CF write what has no dimension


@dataclass(frozen=True)
class Piece:
    """A block of an array and the file that holds it, as a dataset of the array's name."""

    file: str
    box: Box


def read_index(directory: Path, names: list[str], files: Mapping[str, Any]) -> dict[str, list[Piece]]:
    """Return the pieces of some arrays of a checkpoint whose index is verified.

    Raises
    ------
    CheckpointError
        If it lacks an array or needs files that the manifest does not tell of.
    """
    import h5py

    with h5py.File(directory / INDEX, "r") as file:
        missing = [name for name in names if name not in file]
        if missing:
            raise CheckpointError(f"{directory} is damaged: {INDEX} has no {', '.join(missing[:3])}")
        pieces = {name: _pieces(file[name]) for name in names}
    needed = {piece.file for some in pieces.values() for piece in some}
    if not needed <= set(files):
        raise CheckpointError(f"{directory} is damaged: {INDEX} needs {sorted(needed - set(files))}")
    return pieces


def _pieces(dataset: Any) -> list[Piece]:
    if not dataset.is_virtual:  # of an array without elements
        return []
    return [Piece(source.file_name, _box(source.vspace, dataset.shape)) for source in dataset.virtual_sources()]


def _box(space: Any, shape: tuple[int, ...]) -> Box:
    if not shape:
        return ()
    low, high = space.get_select_bounds()
    return tuple((int(start), int(last) + 1) for start, last in zip(low, high, strict=True))
