"""The grids of the layer tests in every mode; a grid's axes tell its mode: depth first is 2.5d, depth last 3d."""

import pytest

from colossal_mpi.layers import Parallelism

GRIDS = (
    {},
    {"col": 2},
    {"col": 3},
    {"row": 2, "col": 2},
    {"row": 2, "col": 3},
    {"depth": 2, "row": 1, "col": 2},
    {"depth": 2, "row": 2, "col": 2},
    {"row": 2, "col": 2, "depth": 2},
    {"row": 1, "col": 2, "depth": 2},
    {"row": 2, "col": 1, "depth": 2},
    {"data": 2, "col": 2},
    {"data": 2, "row": 2, "col": 2},
    {"data": 2, "depth": 2, "row": 1, "col": 2},
    {"data": 2, "row": 1, "col": 2, "depth": 2},
)
SEQUENCE = ({"seq": 3}, {"ulysses": 2, "row": 2}, {"seq": 2, "ulysses": 2, "col": 2})
"""Grids that cut the sequence, too."""
every_mode = pytest.mark.grids(*GRIDS)
every_cut = pytest.mark.grids(*GRIDS, *SEQUENCE)
FEW = ({}, {"col": 2}, {"row": 2, "col": 2}, {"depth": 2, "row": 1, "col": 2}, {"col": 2, "depth": 2})
few = pytest.mark.grids(*FEW)


def mode_of(grid):
    axes = [axis for axis in grid.axes if axis not in ("data", "seq", "ulysses")]
    if "depth" in axes:
        return "2.5d" if axes[0] == "depth" else "3d"
    return "2d" if "row" in axes else "1d" if axes else None


def parallelism(grid, keep_gathered=True):
    return Parallelism(grid, mode_of(grid), keep_gathered)
