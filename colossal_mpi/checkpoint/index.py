"""``index.h5``: every array as one global dataset, for HDF5 tools and for loading.

`colossal_mpi.checkpoint.saving` writes the index from the arrays that all ranks save;
`colossal_mpi.checkpoint.loading` and `colossal_mpi.checkpoint.inspection` read from it which file holds which block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_mpi import files as disk
from colossal_mpi.checkpoint.directory import INDEX, rank_file_name
from colossal_mpi.checkpoint.manifest import FileRecord, ManifestHead, SavedArray, axes_text, stored_dtype
from colossal_mpi.errors import CheckpointError
from colossal_mpi.layout import Box, box_shape, index_of

if TYPE_CHECKING:
    import h5py


def write_index(directory: Path, arrays: Mapping[str, SavedArray], head: ManifestHead) -> None:
    """Write the index of a checkpoint and flush it to the disk."""
    with disk.new_hdf5(directory / INDEX) as file:
        file.attrs["format_version"] = head["format_version"]
        for name, value in head["values"].items():
            dataset = file.create_dataset(name, data=value["value"])
            dataset.attrs["units"] = value["units"]
        for array in arrays.values():
            _add_virtual_dataset(file, array)


def _add_virtual_dataset(file: h5py.File, array: SavedArray) -> None:
    import h5py

    whole = h5py.VirtualLayout(array.shape, stored_dtype(array.dtype))
    for rank, box in array.owned_boxes():
        whole[index_of(box)] = h5py.VirtualSource(rank_file_name(rank), array.name, box_shape(box))
    dataset = file.create_virtual_dataset(array.name, whole)
    dataset.attrs["shape"] = np.array(array.shape, np.int64)
    dataset.attrs["dtype"] = array.dtype
    dataset.attrs["layout"] = repr(array.layout)
    dataset.attrs["grid"] = axes_text(array.axes)
    dataset.attrs["units"] = "1"  # the unit of a dimensionless quantity in UDUNITS and CF


@dataclass(frozen=True)
class SavedBlock:
    """A block of an array: its box, and the file whose dataset of the array's name holds it."""

    file: str
    box: Box


def read_index(directory: Path, names: list[str], files: Mapping[str, FileRecord]) -> dict[str, list[SavedBlock]]:
    """Return the blocks of some arrays; the caller has verified the index.

    Raises
    ------
    CheckpointError
        If the index lacks an array, points to files that the manifest does not list or to datasets of another name, or
        does not cover an array.
    """
    try:
        with disk.open_hdf5(directory / INDEX, within=directory) as file:
            missing = [name for name in names if not _is_own(file, name)]
            if missing:
                raise CheckpointError(f"{directory} is damaged: {INDEX} has no {', '.join(missing[:3])}")
            blocks = {name: _saved_blocks(file[name]) for name in names}
    except OSError as problem:
        raise CheckpointError(f"{directory} is damaged: {INDEX}: {problem.strerror}") from None
    except ValueError as problem:
        raise CheckpointError(f"{directory} is damaged: {INDEX}: {problem}") from None
    needed = {block.file for of_array in blocks.values() for block in of_array}
    if not needed <= set(files):
        raise CheckpointError(f"{directory} is damaged: {INDEX} needs {sorted(needed - set(files))}")
    return blocks


def _is_own(file: h5py.File, name: str) -> bool:
    """Return whether a name leads to a dataset of the index without links."""
    import h5py

    found: Any = file
    for part in name.split("/"):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            return False
        found = found[part]
    return isinstance(found, h5py.Dataset)


def _saved_blocks(dataset: h5py.Dataset) -> list[SavedBlock]:
    """Return the blocks of an array, which cover it and are each the dataset of its own name."""
    name, blocks, covered = dataset.name.strip("/"), [], 0
    for source in dataset.virtual_sources() if dataset.is_virtual else ():
        if source.dset_name.strip("/") != name:
            raise ValueError(f"{name} points to {source.dset_name}")
        blocks.append(SavedBlock(source.file_name, _box(source.vspace, dataset.shape)))
        covered += math.prod(box_shape(blocks[-1].box))
    if covered != dataset.size:  # an array without elements has a plain dataset
        raise ValueError(f"the blocks of {name} have {covered} of its {dataset.size} elements")
    return blocks


def _box(space: h5py.h5s.SpaceID, shape: tuple[int, ...]) -> Box:
    if not shape:
        return ()
    low, high = space.get_select_bounds()
    return tuple((int(start), int(last) + 1) for start, last in zip(low, high, strict=True))
