"""Every redistribution keeps the global array, receives exactly the lacking words, and has its adjoint."""

import math

import array_api_strict
import numpy as np
import pytest

from colossal_mpi import DistArray, Layout, comm, from_global, ledger
from colossal_mpi.comm import transport
from colossal_mpi.layout import part
from colossal_mpi.redistribution import cotangent, received
from tests.cases import astray, host, inner, integers, lacking, layouts, on, represents, some, spread, totals

GRIDS = [{"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 1, "col": 3}, {"a": 2, "b": 2, "c": 2}]
SHAPES = [(7, 5), (1, 9), (2, 3, 5)]
BOTH = ("row", "col")
MOST, SAMPLE = 324, 120  # every pair of the 18 layouts of a matrix on two axes, or some

every_case = [pytest.mark.grids(*GRIDS), pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))]


def cases(grid, shape, partial=True):
    """Return pairs of a source and a target layout."""
    known = layouts(len(shape), list(grid.axes), partial)
    pairs = [(source, target) for source in known for target in known]
    return pairs if len(pairs) <= MOST else some(pairs, SAMPLE)


def on_every_case(test):
    for mark in every_case:
        test = mark(test)
    return test


@on_every_case
def test_every_move_keeps_the_global_array(grid, shape):
    whole = integers(shape)
    moved = {f"{s} -> {t}": spread(whole, grid, s).redistribute(t) for s, t in cases(grid, shape)}
    assert not astray(moved, whole)


@on_every_case
def test_every_move_has_its_adjoint(grid, shape):
    """<F x, y> == <x, F* y> for F from `source` to `target`, by inner products of the global arrays."""
    forward, backward = [], []
    for source, target in cases(grid, shape):
        x = spread(integers(shape, seed=2), grid, source)
        y = from_global(integers(shape, seed=3), grid, cotangent(target))
        forward.append(inner(x.redistribute(target), y))
        backward.append(inner(x, y.redistribute(cotangent(source))))
    pairs = zip(cases(grid, shape), totals(forward, grid), totals(backward, grid), strict=True)
    assert not [f"{case}: {one} and {other}" for case, one, other in pairs if one != other]


@on_every_case
def test_every_move_receives_what_is_lacking(grid, shape):
    wrong = []
    for source, target in cases(grid, shape, partial=False):
        with ledger.record() as moved:
            from_global(integers(shape), grid, source).redistribute(target)
        if moved.words != lacking(shape, source, target, grid):
            wrong.append(f"{source} -> {target}: {moved.words} words")
    assert not wrong


@on_every_case
def test_the_words_of_every_move_are_foretold(grid, shape):
    wrong = []
    for source, target in cases(grid, shape):
        x = from_global(integers(shape), grid, source)
        with ledger.record() as moved:
            y = x.redistribute(target)
        if moved.words != received(shape, x.layout, y.layout, grid.axes)[grid.rank]:
            wrong.append(f"{source} -> {target}: {moved.words} words")
    assert not wrong


def reduce_scatter_words(p, own):
    return (p - 1) * own


def allreduce_words(p, n, rank):
    start, stop = part(n, p, rank)
    return reduce_scatter_words(p, stop - start) + n - (stop - start)


SUMS = {
    "scatter": (Layout("row", None, partial="col"), Layout("row", "col"), "s"),
    "scatter-nested": (Layout("row", None, partial="col"), Layout(BOTH, None), "s"),
    "scatter-two": (Layout(None, None, partial=BOTH), Layout("col", "row"), "s"),
    "all": (Layout("row", None, partial="col"), Layout("row", None), "a"),
    "all-two": (Layout(None, None, partial=BOTH), Layout(None, None), "a"),
    "scatter-and-all": (Layout(None, None, partial=BOTH), Layout("row", None), "sa"),
    "sliced-first": (Layout(None, None, partial="col"), Layout("row", "col"), "s"),
    "sliced-first-nested": (Layout(None, None, partial="col"), Layout(BOTH, None), "s"),
    "sliced-before-all": (Layout(None, None, partial="col"), Layout("row", None), "a"),
    "part-of-it": (Layout(None, None, partial=BOTH), Layout(None, "col", partial="row"), "s"),
}


@pytest.mark.grids({"row": 2, "col": 3})
@pytest.mark.parametrize(("source", "target", "steps"), SUMS.values(), ids=SUMS)
def test_a_sum_receives_what_the_table_says(grid, source, target, steps):
    x = spread(integers((7, 5)), grid, source)
    scattered = [axis for axis in target.cut if axis in source.partial]
    rest = [axis for axis in source.partial if axis not in (*scattered, *target.partial)]

    with ledger.record() as moved:
        y = x.redistribute(target)

    own = math.prod(y.local.shape)
    expected = reduce_scatter_words(grid.extent(scattered), own) if "s" in steps else 0
    if "a" in steps:
        expected += allreduce_words(grid.extent(rest), own, grid.comm(rest).rank)
    assert moved.words == expected


@pytest.mark.grids({"row": 2, "col": 2}, {"a": 2, "b": 2, "c": 2})
def test_nothing_moves_where_nothing_is_lacking(grid):
    first, *others = grid.axes
    whole = from_global(integers((7, 5)), grid, Layout(None, None))
    with ledger.record() as moved:
        whole.redistribute(Layout((first, *others), None)).redistribute(Layout((first, *others), None))
        whole.redistribute(Layout(first, None)).redistribute(Layout((first, *others), None))
        whole.redistribute(Layout(None, None, partial=others))
    assert not moved.events


ONE = {
    "swap": (Layout("row", "col"), Layout("col", "row"), "all_to_all", BOTH),
    "turn": (Layout("row", "col"), Layout(("col", "row"), None), "all_to_all", BOTH),
    "other-dim": (Layout("row", None), Layout(None, "row"), "all_to_all", ("row",)),
    "gather-dim-0": (Layout("row", "col"), Layout(None, "col"), "allgather", ("row",)),
    "gather-dim-1": (Layout("row", "col"), Layout("row", None), "allgather", ("col",)),
    "gather-all": (Layout("row", "col"), Layout(None, None), "allgather", BOTH),
    "gather-inner": (Layout(BOTH, None), Layout("row", None), "allgather", ("col",)),
}


@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize(("source", "target", "op", "axes"), ONE.values(), ids=ONE)
def test_a_move_is_one_collective_over_the_axes_that_change(grid, source, target, op, axes):
    array = from_global(integers((7, 5)), grid, source)
    with ledger.record() as moved:
        array.redistribute(target)
    assert [(event.op, event.axes) for event in moved.events] == [(op, axes)]


@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 3})
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "int32", "int64"])
def test_every_dtype_is_kept(grid, dtype):
    whole = integers((7, 5), dtype)
    array = spread(whole, grid, Layout("row", None, partial="col"))
    for target in [Layout("col", None), Layout(None, "row"), Layout(None, ("col", "row"))]:
        array = array.redistribute(target)
        assert array.dtype == whole.dtype
        assert represents(array, whole)


@pytest.mark.grids({"row": 2, "col": 3}, {"a": 2, "b": 2, "c": 2})
def test_replicas_are_bitwise_equal_after_a_sum(grid):
    first, *_, last = grid.axes
    rng = np.random.default_rng(grid.rank)
    source = Layout(None, None, partial=tuple(grid.axes))
    array = DistArray(on(grid, rng.standard_normal((7, 5))), (7, 5), source, grid)
    for target in [Layout(None, None), Layout(first, None), Layout(None, last), Layout(None, None, partial=first)]:
        block = array.redistribute(target)
        held = comm.collect((dict(grid.coords), host(block).tobytes()), grid)
        places = {*block.layout.cut, *block.layout.partial}
        mine = {data for at, data in held if all(at[axis] == grid.coords[axis] for axis in places)}
        assert len(mine) == 1, target


def own_terms_only(block, grid, axes, counts, op=None):
    rank = grid.comm(axes).rank
    return block[sum(counts[:rank]) : sum(counts[: rank + 1])]


@pytest.mark.grids({"row": 2, "col": 3})
@pytest.mark.parametrize(
    "test", [test_every_move_keeps_the_global_array, test_every_move_has_its_adjoint], ids=["value", "adjoint"]
)
def test_these_tests_see_a_sum_that_forgets_other_ranks(grid, monkeypatch, test):
    monkeypatch.setattr(transport, "reduce_scatter", own_terms_only)
    with pytest.raises(AssertionError):
        test(grid, (7, 5))


@pytest.mark.grids({"row": 2, "col": 2})
def test_blocks_need_not_be_numpy(grid):
    whole, moved = integers((7, 5)), {}
    for source, target in cases(grid, whole.shape):
        x = spread(whole, grid, source)
        x.local = array_api_strict.asarray(host(x).copy())
        moved[f"{source} -> {target}"] = x.redistribute(target)
    assert {type(array.local) for array in moved.values()} == {type(array_api_strict.asarray(0))}
    assert not astray(moved, whole)


@pytest.mark.grids({"row": 2, "col": 3})
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0, 2)], ids=str)
def test_arrays_without_dims_or_elements(grid, shape):
    whole = integers(shape)
    moved = {f"{s} -> {t}": spread(whole, grid, s).redistribute(t) for s, t in cases(grid, shape)}
    assert not astray(moved, whole)
