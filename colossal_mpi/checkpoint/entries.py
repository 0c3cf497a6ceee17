"""What all ranks save together: the arrays, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from colossal_mpi import comm
from colossal_mpi.checkpoint.hdf5 import NUMBERS, require_name
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, coords_of, rank_of
from colossal_mpi.platform import backend

BITS = {"bfloat16": "uint16"}
"""Dtypes that HDF5 has no type for, and the dtype as which their bits are stored."""


def stored(dtype: str) -> np.dtype:
    """Return the dtype of the datasets of an array."""
    return np.dtype(BITS.get(dtype, dtype))


def text_of(axes: Mapping[str, int]) -> str:
    """Return the axes of a grid for a reader."""
    return ", ".join(f"{axis}={size}" for axis, size in axes.items())


@dataclass(frozen=True)
class Entry:
    """An array and the ranks of the whole grid that hold it, in the order of its own grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    axes: dict[str, int]
    ranks: list[int]

    @property
    def grid(self) -> str:
        """Its grid, for a reader."""
        return text_of(self.axes)

    def pieces(self) -> Iterator[tuple[int, Box]]:
        """Yield the ranks that own blocks, and these."""
        for place, rank in enumerate(self.ranks):
            box = self.layout.owned(self.shape, self.axes, coords_of(place, self.axes))
            if box is not None:
                yield rank, box


def owned(array: DistArray) -> bool:
    """Say whether this rank writes its block of an array."""
    return array.layout.owned(array.shape, array.grid.axes, array.grid.coords) is not None


def owned_bytes(arrays: Mapping[str, DistArray]) -> int:
    """Return the bytes of the blocks that this rank writes."""
    return sum(array.local.nbytes for array in arrays.values() if owned(array))


def gather(arrays: Mapping[str, DistArray], grid: Grid) -> dict[str, Entry]:
    """Return the arrays of all ranks by name, checked; the first rank of each array's grid tells of it.

    Raises
    ------
    CheckpointError
        On all ranks.
    """
    with comm.agreed(grid, CheckpointError):
        for name, array in arrays.items():
            _require_savable(name, array, grid)
    told = [_entry(name, array, grid) for name, array in arrays.items() if array.grid.rank == 0]
    entries = [entry for some in comm.collect(told, grid) for entry in some]
    names = {entry.name: entry for entry in entries}
    if len(names) < len(entries):
        twice = next(entry.name for entry in entries if names[entry.name] is not entry)
        raise CheckpointError(f"{twice} is saved by two parts of the grid: it must come from one of them")
    require_tree(names)
    return names


def require_tree(names: Mapping[str, object]) -> None:
    """Refuse names of which one lies under another.

    Raises
    ------
    CheckpointError
    """
    for name in names:
        parts = name.split("/")
        if any("/".join(parts[:i]) in names for i in range(1, len(parts))):
            raise CheckpointError(f"{name!r} lies under the name of another array: HDF5 cannot hold both")


def _require_savable(name: str, array: DistArray, grid: Grid) -> None:
    require_name(name)
    if array.layout.partial:
        raise CheckpointError(f"{name} is {array.layout}: partial sums cannot be saved; redistribute it first")
    if array.grid is not grid and not grid.has(array.grid):
        raise CheckpointError(f"{name} lies on another grid, {array.grid}: save the arrays of one grid at a time")
    dtype = backend.numpy_dtype(array.dtype)
    if dtype.name not in BITS and dtype.kind not in NUMBERS:
        raise CheckpointError(f"{name} is of dtype {dtype}, which HDF5 has no type for: cast it with .astype first")


def _entry(name: str, array: DistArray, grid: Grid) -> Entry:
    own = array.grid
    ranks = [rank_of({**grid.coords, **own.coords_of(place)}, grid.axes) for place in range(own.size)]
    return Entry(name, array.shape, str(backend.numpy_dtype(array.dtype)), array.layout, dict(own.axes), ranks)
