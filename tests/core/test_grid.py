"""Grids order ranks and groups as MPI does, make sub-grids and caches, and refuse sizes and axes that do not fit."""

import gc

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import DistArray, Grid, GridError, Layout, comm, from_global
from colossal_mpi.grid import GridCache
from tests.cases import integers, refusal, represents

TWO = {"row": 2, "col": 2}
THREE = {"pipe": 2, "row": 1, "col": 3}


def members(grid, axes):
    """Return the grid ranks of this rank's group along `axes`, in the order of a NumPy array of all ranks."""
    ranks = np.arange(grid.size).reshape(list(grid.axes.values()))
    return ranks[tuple(slice(None) if axis in axes else at for axis, at in grid.coords.items())].ravel().tolist()


@pytest.mark.smoke
@pytest.mark.grids(TWO, THREE)
def test_ranks_and_coords_are_those_of_mpi_cart(grid):
    cart = MPI.COMM_WORLD.Create_cart(list(grid.axes.values()), reorder=False)
    assert list(grid.axes) == list(grid.coords)
    assert list(grid.coords.values()) == cart.Get_coords(cart.rank)
    assert (grid.rank, grid.size) == (cart.rank, cart.size)
    assert all(list(grid.coords_of(rank).values()) == cart.Get_coords(rank) for rank in range(grid.size))
    cart.Free()


@pytest.mark.grids({"row": 1, "col": 1})
def test_one_rank_is_a_grid(grid):
    assert dict(grid.coords) == {"row": 0, "col": 0}
    assert grid.comm(("row",)).size == 1


def test_a_grid_may_have_no_axes():
    grid = Grid()
    assert (dict(grid.axes), grid.size, repr(grid)) == ({}, 1, "Grid()")


@pytest.mark.grids(TWO, THREE)
def test_a_group_is_in_the_order_of_the_grid(grid):
    names = list(grid.axes)
    for axes in [(), *((axis,) for axis in names), (names[-1], names[0]), tuple(reversed(names))]:
        group = grid.comm(axes)
        assert group.allgather(grid.rank) == members(grid, axes)
        assert [grid.coords_of(r, axes) for r in range(group.size)] == [
            {axis: grid.coords_of(member)[axis] for axis in names if axis in axes} for member in members(grid, axes)
        ]
        assert grid.extent(axes) == group.size
        assert grid.comm(tuple(reversed(axes))) is group


@pytest.mark.grids(TWO)
def test_a_group_along_an_unknown_axis_is_an_error_on_all_ranks(grid):
    kind, text = refusal(lambda: grid.comm(("row", "depth")), grid)
    assert kind is GridError
    assert "no axis 'depth' on Grid(row=2, col=2)" in text


def test_sizes_may_be_integers_of_numpy():
    made = Grid(row=np.int64(1), col=np.int32(1))
    assert repr(made) == "Grid(row=1, col=1)"
    assert all(type(size) is int for size in made.axes.values())


@pytest.mark.grids(THREE, {"row": 2, "pipe": 2})
def test_at_is_the_grid_of_the_other_axes(grid):
    sub = grid.at(pipe=grid.coords["pipe"])

    assert dict(sub.axes) == {axis: size for axis, size in grid.axes.items() if axis != "pipe"}
    assert dict(sub.coords) == {axis: at for axis, at in grid.coords.items() if axis != "pipe"}
    assert comm.collect(grid.rank, sub) == members(grid, [axis for axis in grid.axes if axis != "pipe"])
    assert grid.at(pipe=grid.coords["pipe"]) is sub


@pytest.mark.grids(THREE)
def test_arrays_live_on_a_sub_grid(grid):
    stage = grid.at(pipe=grid.coords["pipe"])
    whole = integers((7, 5), seed=grid.coords["pipe"])

    array = from_global(whole, stage, Layout("col", None)).redistribute(Layout(None, "col"))

    assert represents(array, whole)
    assert np.array_equal(array.gather(), whole)


@pytest.mark.grids(TWO)
def test_at_all_coordinates_is_this_rank_alone(grid):
    alone = grid.at(**grid.coords)
    array = DistArray(np.full((2,), float(grid.rank)), (2,), Layout(None), alone)
    assert (alone.size, array.sum()) == (1, 2.0 * grid.rank)


@pytest.mark.grids(TWO)
def test_at_asks_for_this_ranks_own_coordinates(grid):
    with pytest.raises(GridError, match=f"this rank lies at row={grid.coords['row']}, col={grid.coords['col']}"):
        grid.at(row=2)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"row": 2, "col": 3}, r"Grid\(row=2, col=3\) needs 6 ranks and there are 4.*product is 4"),
        ({"row": 2}, r"Grid\(row=2\) needs 2 ranks and there are 4"),
        ({}, r"needs 1 ranks and there are 4"),
        ({"row": 0, "col": 4}, "the size of row must be a positive integer, not 0"),
        ({"row": -2, "col": -2}, "the size of row must be a positive integer, not -2"),
        ({"row": 2.0, "col": 2}, "the size of row must be a positive integer, not 2.0"),
        ({"row": 4, "device": "tpu"}, "device='tpu': use 'auto', 'cpu' or 'cuda'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error_on_all_ranks(axes, message):
    with pytest.raises(GridError, match=message) as caught:
        Grid(**axes)
    assert len(set(MPI.COMM_WORLD.allgather(str(caught.value)))) == 1


@pytest.mark.ranks(4)
def test_a_grid_of_some_of_the_ranks():
    half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
    grid = Grid(half, col=2)
    assert comm.collect(MPI.COMM_WORLD.rank, grid) == [MPI.COMM_WORLD.rank % 2, MPI.COMM_WORLD.rank % 2 + 2]


@pytest.mark.grids({"pipe": 2, "col": 2})
def test_a_sub_grid_is_freed_without_its_parent(grid):
    with grid.at(pipe=grid.coords["pipe"]) as part:
        assert comm.collect(part.rank, part) == [0, 1]
    assert comm.collect(grid.rank, grid) == [0, 1, 2, 3]
    assert comm.collect(grid.rank, grid.at(pipe=grid.coords["pipe"])) == [2 * grid.coords["pipe"] + r for r in (0, 1)]


def test_a_cache_keeps_the_values_used_last_until_the_grid_is_freed():
    cache = GridCache[int, int](limit=2)
    grid, other = Grid(), Grid()
    made = []

    def value(on, key):
        return cache.get(on, key, lambda: made.append(key) or 10 * key)

    assert [value(grid, key) for key in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2]  # 3 took the place of 2, the least recently used
    assert value(other, 1) == 10
    grid.free()
    assert not cache.of(grid)
    assert list(cache.of(other)) == [1]
    del other
    gc.collect()
    assert list(cache._of) == [grid]


@pytest.mark.ranks(2)
def test_ranks_that_name_other_axes_are_told_so_on_all_of_them():
    first = MPI.COMM_WORLD.rank == 0
    with pytest.raises(GridError, match=r"ranks 0 and 1 differ in its axes: \{'row': 2, 'col': 1\} on rank 0"):
        Grid(**({"row": 2, "col": 1} if first else {"col": 1, "row": 2}))
    with pytest.raises(GridError, match=r"differ in its axes: .*'row': 3.* on rank 1"):
        Grid(row=2 if first else 3)
    Grid(row=2).free()


@pytest.mark.ranks(2)
def test_ranks_with_other_files_of_the_package_are_told_so_on_all_of_them(monkeypatch):
    if MPI.COMM_WORLD.rank == 1:
        monkeypatch.setattr("colossal_mpi.runtime.agreement.fingerprint", lambda: "0123456789ab")
    with pytest.raises(
        GridError, match="differ in the files of colossal_mpi: .* 0123456789ab in .* on rank 1; install"
    ):
        Grid(row=2)
