"""Indexing gives the parts that NumPy gives, in every layout, and moves only the words that are lacking."""

import math

import array_api_strict
import numpy as np
import pytest

from colossal_mpi import DistArray, IndexingError, Layout, ShapeError, from_global, ledger, linalg, zeros
from tests.cases import host, indices, integers, layouts, refusal, represents, some, spread

SQUARE, WIDE, SLIM, CUBE = {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 1, "col": 4}, {"a": 2, "b": 2, "c": 2}
on_grids = pytest.mark.grids(SQUARE, WIDE, SLIM)
SHAPE = (7, 9)

INDICES = {
    "rows": np.s_[2:6, :], "one-dim": np.s_[2:6], "columns": np.s_[:, 3:8], "both": np.s_[1:-1, -5:-1],
    "row": np.s_[4], "column": np.s_[:, 7], "last-column": np.s_[:, -1], "element": np.s_[3, -2],
    "row-part": np.s_[0, 2:7], "numpy-integer": np.s_[np.int64(5), :], "0d-array": np.s_[np.array(2)],
    "beyond": np.s_[5:100, -100:2], "nothing": np.s_[3:3, 5:2], "whole": np.s_[:, :],
    "steps": np.s_[::2, 1:8:3], "backwards": np.s_[::-1, ::-2], "backwards-part": np.s_[5:1:-3, 7:None:-1],
    "ellipsis": np.s_[..., 2:5], "ellipsis-alone": np.s_[...], "ellipsis-of-none": np.s_[1:3, ..., 4:],
    "new-dims": np.s_[None, 1:5, None, :], "new-of-row": np.s_[None, 3], "new-last": np.s_[..., None], "empty": (),
}  # fmt: skip

on_indices = pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)


def held(shape, layout, grid, index, coords):
    """Return the set of global elements, as numbers, of the part of `shape` that the rank at `coords` holds."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    mine = np.zeros(shape, bool)
    mine[np.ix_(*indices(shape, layout, grid.axes, coords))] = True
    return set(np.asarray(numbers[index])[np.asarray(mine[index])].ravel())


@pytest.mark.grids(SQUARE, WIDE, SLIM, CUBE)
@on_indices
def test_parts_are_those_of_numpy_and_move_what_is_lacking(grid, index):
    whole = integers(SHAPE)
    numbers = np.arange(whole.size).reshape(SHAPE)
    for layout in some(layouts(2, grid.axes), 15):
        a = spread(whole, grid, layout)
        with ledger.record() as moved:
            part = a[index]
        assert represents(part, np.asarray(whole[index])), layout
        assert part.layout.partial == a.layout.partial
        place = np.ix_(*indices(part.shape, part.layout, grid.axes, grid.coords))
        wanted = set(np.asarray(numbers[index])[place].ravel())
        assert moved.words == len(wanted - held(SHAPE, a.layout, grid, index, grid.coords)), layout


@on_grids
def test_a_dim_keeps_its_axes_and_an_integers_is_dropped(grid):
    for layout in layouts(2, grid.axes):
        a = zeros(SHAPE, grid, layout)
        rows, columns = a.layout.dims
        assert a[1:4, ::2].layout.dims == (rows, columns)
        assert a[:, 3].layout.dims == (rows,)
        assert a[None, 2].layout.dims == ((), columns)


@pytest.mark.grids(WIDE)
def test_parts_along_whole_dims_are_free_views(grid):
    a = zeros(SHAPE, grid, Layout(("row", "col"), None))
    with ledger.record() as moved:
        a[:, 2:7].local[...] = 1
        a[:, -1].local[...] = 2
        a[..., 0:2:2, None].local[...] = 3
    assert not moved.events
    assert np.array_equal(a.gather(), np.array([[3, 0, 1, 1, 1, 1, 1, 0, 2]] * 7))


@on_grids
def test_a_dim_of_one_side_only_moves_nothing_of_the_other(grid):
    """The column that one rank of `col` holds goes to the others of its row, and to nobody else."""
    axis = list(grid.axes)[-1]
    a = from_global(integers(SHAPE), grid, Layout(None, axis))
    with ledger.record() as moved:
        a[:, 0]
    assert moved.words == (0 if grid.coords[axis] == 0 else 7)
    assert set(moved.by_axis()) <= {axis}


@pytest.mark.grids(SQUARE)
def test_an_array_can_be_walked_through(grid):
    whole = integers((3, 5))
    rows = list(from_global(whole, grid, Layout("row", "col")))
    assert len(rows) == 3
    assert all(represents(row, expected) for row, expected in zip(rows, whole, strict=True))


@pytest.mark.grids(SQUARE)
@on_indices
def test_blocks_need_not_be_numpy(grid, index):
    whole = integers(SHAPE)
    for layout in some(layouts(2, grid.axes), 10):
        a = spread(whole, grid, layout)
        a = DistArray(array_api_strict.asarray(host(a).copy()), a.shape, a.layout, grid)
        part = a[index]
        assert type(part.local) is type(a.local)
        assert represents(part, np.asarray(whole[index])), layout


WRONG = {
    "list": (([0, 1],), "[list] of shape (7, 9): list cannot index a DistArray; use integers, "),
    "mask": (np.ones(7, bool), "ndarray cannot index a DistArray"),
    "truth-value": (True, "bool cannot index a DistArray"),
    "number": (1.5, "float cannot index a DistArray"),
    "too-many": (np.s_[1, 2, 3], "[1, 2, 3] of shape (7, 9): at most 2 indices and one ellipsis"),
    "two-ellipses": (np.s_[..., ...], "[..., ...] of shape (7, 9): at most 2 indices and one ellipsis"),
    "out-of-range": (np.s_[1:3, -10], "[1:3, -10] of shape (7, 9): -10 is out of range for dim 1 of size 9"),
    "step-of-zero": (np.s_[::0], "[::0] of shape (7, 9): slice step cannot be zero"),
    "bound": (np.s_["a":], "slice indices must be integers"),
}


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize(("index", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_an_index_is_the_same_error_on_all_ranks(grid, index, message):
    a = zeros(SHAPE, grid, Layout("row", "col"))
    kind, text = refusal(lambda: a[index], grid)
    assert kind is IndexingError
    assert issubclass(kind, IndexError)
    assert message in text


@on_grids
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_conjugates_and_transposes_move_nothing(grid, dtype):
    whole, stack = integers(SHAPE, dtype), integers((2, 3, 5), dtype)
    for layout, of_stack in zip(some(layouts(2, grid.axes), 15), some(layouts(3, grid.axes), 15), strict=False):
        a, b = spread(whole, grid, layout), spread(stack, grid, of_stack)
        with ledger.record() as moved:
            made = [(a.conj(), whole.conj()), (a.H, whole.conj().T), (a.mT, whole.T), (linalg.transpose(a), whole.T)]
            made += [(b.mT, stack.swapaxes(1, 2)), (b.H, stack.conj().swapaxes(1, 2)), (linalg.transpose(b), stack.T)]
        assert not moved.events
        assert all(represents(array, expected) for array, expected in made), layout
    assert (a.conj() is a) == (dtype == "float64")


@on_grids
def test_a_transpose_in_a_layout_moves_what_its_blocks_lack(grid):
    whole = integers(SHAPE)
    for source, target in some(
        [(s, t) for s in layouts(2, grid.axes, False) for t in layouts(2, grid.axes, False)], 25
    ):
        a = from_global(whole, grid, source)
        with ledger.record() as moved:
            turned = linalg.transpose(a, target)
        have, want = (indices(x.shape, x.layout, grid.axes, grid.coords) for x in (a, turned))
        common = math.prod(len(set(h) & set(w)) for h, w in zip(reversed(have), want, strict=True))
        assert represents(turned, whole.T)
        assert moved.words == turned.local.size - common, (source, target)


@pytest.mark.grids(SQUARE)
def test_a_vector_has_no_matrix_transpose(grid):
    kind, text = refusal(lambda: zeros((4,), grid, Layout("row")).H, grid)
    assert kind is ShapeError
    assert "mT of shape (4,): it needs 2 dims or more" in text
