"""Arithmetic, sums and gathers of distributed arrays are right in every layout, and misuse is an error on all ranks."""

import math
import operator

import numpy as np
import pytest

from colossal_mpi import DistArray, Grid, Layout, LayoutError, ShapeError, comm, from_global, full, ledger, zeros
from colossal_mpi.layout import index_of
from colossal_mpi.redistribution import gather
from tests.cases import block_of, host, integers, layouts, refusal, represents, some, spread

SQUARE, LINE, SLIM = {"row": 2, "col": 2}, {"col": 3}, {"row": 1, "col": 3}
SHAPE = (7, 5)
EPS = np.finfo("float64").eps

on_grids = pytest.mark.grids(SQUARE, SLIM)


def cut(grid, partial=True):
    return layouts(2, list(grid.axes), partial)


@on_grids
def test_from_global_takes_this_ranks_block(grid):
    whole = integers(SHAPE)
    for layout in cut(grid):
        array = from_global(whole, grid, layout)
        assert represents(array, whole), layout
        holds = all(grid.coords[axis] == 0 for axis in array.layout.partial)
        assert np.array_equal(host(array), block_of(whole, layout, grid) * holds)
        assert not np.shares_memory(host(array), whole)


@on_grids
def test_from_global_asks_a_callable_for_the_block_only(grid):
    whole, asked = integers(SHAPE), []

    def made(index):
        asked.append(index)
        return whole[index]

    for layout in cut(grid):
        array = from_global(made, grid, layout, shape=SHAPE)
        assert whole[asked[-1]].shape == array.local.shape
        assert represents(array, whole), layout


@on_grids
def test_from_global_takes_lists_and_a_dtype(grid):
    array = from_global([[1, 2], [3, 4], [5, 6]], grid, Layout("col", None), dtype="float32")
    assert array.dtype == np.float32
    assert represents(array, np.array([[1, 2], [3, 4], [5, 6]], "float32"))
    with pytest.raises(ShapeError, match="a callable needs shape="):
        from_global(lambda index: index, grid, Layout("col", None))


@on_grids
def test_full_and_zeros_count_each_element_once(grid):
    for layout in cut(grid):
        assert represents(full(SHAPE, 3, grid, layout), np.full(SHAPE, 3.0)), layout
        assert represents(zeros(SHAPE, grid, layout, "int32"), np.zeros(SHAPE, "int32")), layout
    assert zeros(SHAPE, grid, Layout(None, None), "int32").dtype == np.int32


@on_grids
def test_a_block_of_another_shape_is_an_error_that_says_which_fits(grid):
    need = block_of(np.empty(SHAPE), Layout("col", None), grid).shape
    with pytest.raises(ShapeError) as caught:
        DistArray(np.zeros((9, 9)), SHAPE, Layout("col", None), grid)
    assert f"a block of {need}, not (9, 9)" in str(caught.value)
    assert f"{dict(grid.coords)}" in str(caught.value)


@on_grids
@pytest.mark.parametrize("layout", [Layout("depth", None), Layout("col"), Layout("col", None, None)], ids=repr)
def test_a_layout_that_does_not_fit_is_an_error_on_all_ranks(grid, layout):
    array = zeros(SHAPE, grid, Layout(None, None))
    for make in (array.redistribute, lambda layout: zeros(SHAPE, grid, layout)):
        kind, text = refusal(lambda make=make: make(layout), grid)
        assert kind is LayoutError
        assert f"{layout}: " in text


@on_grids
@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv], ids=lambda op: op.__name__)
def test_arithmetic_of_arrays_in_any_two_layouts(grid, op):
    a, b = integers(SHAPE, seed=1), integers(SHAPE, seed=2) * 2 + 1
    for one, other in some([(x, y) for x in cut(grid, False) for y in cut(grid, False)], 50):
        result = op(from_global(a, grid, one), from_global(b, grid, other))
        assert result.layout == one.on(grid.axes, 2)
        assert represents(result, op(a, b)), (one, other)


@on_grids
def test_sums_of_partial_arrays(grid):
    a, b = integers(SHAPE, seed=1), integers(SHAPE, seed=2)
    for one, other in some([(x, y) for x in cut(grid) for y in cut(grid)], 50):
        x, y = spread(a, grid, one), spread(b, grid, other, seed=9)
        assert represents(x + y, a + b), (one, other)
        assert represents(2 * (x - y) / 4 + -y, (a - b) / 2 - b), (one, other)


@on_grids
@pytest.mark.parametrize("scalar", [2, 2.0, np.float64(2), np.int64(2), np.array(2.0)], ids=lambda s: type(s).__name__)
def test_scalars_on_either_side(grid, scalar):
    whole = integers(SHAPE) * 2 + 1
    x = from_global(whole, grid, Layout("col", None))
    sums, of_sums = [scalar + x, x + scalar, scalar - x, x - scalar], [2 + whole, 2 + whole, 2 - whole, whole - 2]
    scaled, of_scaled = [scalar * x, x * scalar, scalar / x, x / scalar], [2 * whole, 2 * whole, 2 / whole, whole / 2]
    results, wanted = [*sums, *scaled, x**scalar], [*of_sums, *of_scaled, whole**2]
    assert all(type(result) is DistArray for result in results)
    assert all(represents(result, want) for result, want in zip(results, wanted, strict=True))


@pytest.mark.grids(LINE)
@pytest.mark.parametrize("other", [np.ones((4, 2)), np.ones(2), [1.0, 2.0]], ids=["block", "row", "list"])
def test_plain_arrays_are_no_scalars(grid, other):
    """Each would fit this rank's block, (4, 2), and be taken for another part of the global array on each rank."""
    x = full((4, 6), 1, grid, Layout(None, "col"))
    for operation in (lambda: x + other, lambda: other - x, lambda: x * other, lambda: other / x):
        kind, text = refusal(operation, grid)
        assert kind is ShapeError
        assert f"an array of shape {np.shape(other)}: make it one too, with from_global" in text


NOT_LINEAR = {
    "scalar + partial": lambda x, y: 1 + x,
    "partial - scalar": lambda x, y: x - 1.0,
    "partial * partial": lambda x, y: x * x,
    "partial * whole": lambda x, y: x * y,
    "whole * partial": lambda x, y: y * x,
    "whole / partial": lambda x, y: y / x,
    "scalar / partial": lambda x, y: 1 / x,
    "partial ** 2": lambda x, y: x**2,
}


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize("operation", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_what_is_not_linear_in_partial_sums_is_an_error_on_all_ranks(grid, operation):
    x = spread(integers(SHAPE), grid, Layout("row", None, partial="col"))
    y = from_global(integers(SHAPE), grid, Layout("row", None))
    kind, text = refusal(lambda: operation(x, y), grid)
    assert kind is LayoutError
    assert "not linear in partial sums; redistribute" in text


@pytest.mark.grids(SQUARE)
def test_arrays_of_other_shapes_or_grids_do_not_add(grid):
    a, b = zeros((7, 5), grid, Layout("row", None)), zeros((5, 7), grid, Layout("row", None))
    other = zeros((7, 5), Grid(row=2, col=2), Layout("row", None))
    (one, of_shapes), (another, of_grids) = refusal(lambda: a + b, grid), refusal(lambda: a + other, grid)
    assert (one, another) == (ShapeError, LayoutError)
    assert "shapes (7, 5) and (5, 7): they must be equal" in of_shapes
    assert "lie on different grids: make both on the same Grid object" in of_grids


@on_grids
def test_transposition_moves_nothing(grid):
    whole = integers((2, 3, 5))
    for layout in layouts(3, list(grid.axes)):
        with ledger.record() as moved:
            turned = spread(whole, grid, layout).T
        assert represents(turned, whole.T), layout
        assert not moved.events


@on_grids
def test_matmul_is_that_of_numpy(grid):
    a, b = integers((7, 5), seed=1), integers((5, 9), seed=2)
    for one, other in some([(x, y) for x in cut(grid) for y in cut(grid)], 30):
        assert represents(spread(a, grid, one) @ spread(b, grid, other, seed=9), a @ b), (one, other)


@on_grids
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (0, 3)], ids=str)
def test_gather_gives_the_global_array_to_the_root(grid, shape):
    whole = integers(shape)
    for layout in cut(grid):
        root = grid.size - 1
        array = spread(whole, grid, layout)
        at_root, everywhere = array.gather(root), array.gather()
        assert np.array_equal(everywhere, whole), layout
        assert np.array_equal(at_root, whole) if grid.rank == root else at_root is None


@pytest.mark.smoke
@pytest.mark.grids(SQUARE)
def test_gather_sends_words_to_the_root_alone(grid):
    for layout in cut(grid, partial=False):
        array = from_global(integers(SHAPE), grid, layout)
        with ledger.record() as moved:
            array.gather(0)
        held = array.local.size if array.layout.owner(grid.axes, grid.coords) else 0
        assert moved.words == (35 - held if grid.rank == 0 else 0), layout


@on_grids
def test_pieces_of_bounded_size_tile_the_array_on_the_root(grid, monkeypatch):
    monkeypatch.setattr(gather, "PIECE", 8)
    whole, root = integers(SHAPE), grid.size - 1
    for layout in cut(grid, partial=False):
        array, pieces = from_global(whole, grid, layout), []
        with ledger.record() as moved:
            failure = array.gather_pieces(lambda box, values, put=pieces: put.append((box, values)), root)
        assert failure is None
        assert all(event.words <= 8 for event in moved.events), layout
        assert all(np.array_equal(values, whole[index_of(box)]) for box, values in pieces), layout
        assert sum(values.size for _, values in pieces) == whole.size * (grid.rank == root)


@on_grids
def test_a_root_that_fails_to_take_a_piece_goes_on_receiving(grid, monkeypatch):
    monkeypatch.setattr(gather, "PIECE", 8)
    array, calls = from_global(integers(SHAPE), grid, Layout("row", "col")), []

    def put(box, values):
        calls.append(box)
        raise OSError("no space left")

    failure = array.gather_pieces(put)
    assert str(failure) == ("no space left" if grid.rank == 0 else "None")
    assert len(calls) == (grid.rank == 0)


@on_grids
def test_pieces_of_partial_sums_are_refused(grid):
    array = full(SHAPE, 1, grid, Layout(None, None, partial="col"))
    assert refusal(lambda: array.gather_pieces(print), grid)[0] is LayoutError


@on_grids
def test_what_gather_returns_is_the_callers_own(grid):
    array = full(SHAPE, 1, grid, Layout(None, None))
    array.gather()[:] = 5
    assert represents(array, np.ones(SHAPE))


@on_grids
@pytest.mark.parametrize("dtype", ["float64", "complex128", "int64"])
def test_sum_counts_each_element_once(grid, dtype):
    whole = integers(SHAPE, dtype)
    for layout in cut(grid):
        total = spread(whole, grid, layout).sum()
        assert total == whole.sum(), layout
        assert type(total) in (int, float, complex)


@on_grids
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_norm_counts_replicas_once(grid, dtype):
    whole = integers(SHAPE, dtype)
    for layout in cut(grid):
        norm = spread(whole, grid, layout).norm()
        assert type(norm) is float
        assert abs(norm - np.linalg.norm(whole)) <= 35 * EPS * np.linalg.norm(whole), layout
        assert len(set(comm.collect(norm, grid))) == 1


@pytest.mark.grids(LINE)
def test_sum_and_norm_of_empty_blocks(grid):
    array = full((2, 3), 2, grid, Layout("col", None))
    nothing = zeros((0, 3), grid, Layout("col", None))
    assert (array.sum(), array.norm()) == (12, math.sqrt(24))
    assert (nothing.sum(), nothing.norm()) == (0, 0)


@pytest.mark.grids(SQUARE)
def test_copy_astype_and_like(grid):
    whole = integers(SHAPE)
    array = from_global(whole, grid, Layout("row", None))
    copy, single = array.copy(), array.astype("float32")
    copy.local[:] = 0
    assert represents(array, whole)
    assert (single.dtype, single.layout) == (np.float32, array.layout)
    assert represents(array.like(array.local + 1), whole + 1)
    assert (array.ndim, array.size, copy.sum()) == (2, 35, 0)


@pytest.mark.grids(SQUARE)
def test_repr_says_shape_dtype_layout_and_grid(grid):
    array = zeros(SHAPE, grid, Layout("row", ("col",)))
    assert repr(array) == "DistArray(shape=(7, 5), dtype=float64, Layout('row', 'col'), Grid(row=2, col=2))"


@pytest.mark.grids({})
@pytest.mark.parametrize(
    ("dtype", "small", "great", "factor"), [("float16", 1e-4, 6e4, 1e6), ("float32", 1e-30, 3e38, 1e40)]
)
def test_a_dtype_is_scaled_by_numbers_that_it_does_not_hold(grid, dtype, small, great, factor):
    for value, change in ((small, factor), (great, 1 / factor)):
        whole = np.array([0.0, value], dtype)
        a, exact = from_global(whole, grid, Layout(None)), whole.astype("float64") * change
        for made in (a * change, a / (1 / change)):
            assert made.dtype == whole.dtype
            assert np.allclose(made.gather().astype("float64"), exact, rtol=2 * np.finfo(dtype).eps, atol=0)
    assert not (zeros((2,), grid, Layout(None), dtype) * 1e300 / 1e-300).gather().any()
