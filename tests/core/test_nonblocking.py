"""Nonblocking redistributions give the same arrays, words and bits as blocking ones, and record their times."""

import time

import numpy as np
import pytest

from colossal_mpi import DistArray, Grid, Layout, comm, from_global, ledger
from colossal_mpi.distarray import start_redistribution
from colossal_mpi.errors import LayoutError
from tests.cases import astray, host, integers, layouts, on, some, spread, totals

GRIDS = pytest.mark.grids({"row": 2, "col": 2}, {"row": 3}, {"row": 3, "col": 2}, {"row": 1, "col": 5})


def pairs(grid, most):
    cases = [(a, b) for a in layouts(2, grid.axes) for b in layouts(2, grid.axes, partial=False)]
    return some(cases, most)


@GRIDS
def test_every_redistribution_is_that_at_once_for_the_same_words(grid):
    for shape, (source, target) in zip([(7, 5), (3, 2), (9, 1)] * 20, pairs(grid, 60), strict=False):
        whole = integers(shape)
        array = spread(whole, grid, source)
        with ledger.record() as once:
            array.redistribute(target)
        with ledger.record() as begun:
            (moved,) = start_redistribution([array], [target]).wait()
        assert moved.layout == target.on(grid.axes, 2)
        assert not astray({"": moved}, whole), (source, target)
        assert totals([begun.words], grid) == totals([once.words], grid), (source, target)
        assert begun.words == once.words


@GRIDS
@pytest.mark.parametrize("dtype", ["float64", "float16", "int8", "complex64"])
def test_several_go_together_in_any_mixture(grid, dtype):
    """Arrays with the same route share messages, and two redistributions under way do not disturb one another."""
    wholes = [integers(shape, dtype, i) for i, shape in enumerate([(7, 5), (2, 3), (5, 9), (0, 4), (7, 1), (4, 4)])]
    cut, both = Layout("row", None), Layout("row", "col")
    whole, summed = Layout(None, None), Layout(None, None, partial=("row",))
    sources = [summed, cut, summed, summed, both, whole]
    targets = [whole, whole, cut, cut, Layout("col", "row"), whole]
    if "col" not in grid.axes:
        sources[4], targets[4] = cut, Layout(None, "row")
    arrays = [spread(w, grid, s.on(grid.axes, 2), i + 1) for i, (w, s) in enumerate(zip(wholes, sources, strict=True))]
    first, second = (start_redistribution(arrays, targets) for _ in range(2))
    again, results = second.wait(), first.wait()
    for result, other, target, value in zip(results, again, targets, wholes, strict=True):
        assert result.layout == target.on(grid.axes, 2)
        assert not astray({"": result, "other": other}, value)


@pytest.mark.grids({"row": 2, "col": 2})
def test_arrays_on_several_grids_go_along_the_axes_of_their_own(grid):
    wholes = [integers((7, 5), "float64", i) for i in range(2)]
    with Grid(row=4) as other:
        arrays = [from_global(whole, g, Layout("row", None)) for whole, g in zip(wholes, (grid, other), strict=True)]
        results = start_redistribution(arrays, [Layout(None, None)] * 2).wait()
        for result, array, whole in zip(results, arrays, wholes, strict=True):
            assert result.grid is array.grid
            assert np.array_equal(host(result), whole)


@pytest.mark.grids({"row": 3}, {"row": 5})
@pytest.mark.parametrize("target", [Layout("row"), Layout(None)], ids=["scattered", "everywhere"])
def test_terms_are_added_in_the_order_of_the_ranks(grid, target):
    """The bits of a sum depend neither on the arrays that share its messages nor on the place of the cut."""
    n = 1000
    values = np.stack([np.random.default_rng(r).normal(size=n) for r in range(grid.size)])
    exact = np.zeros(n)
    for row in values:
        exact += row
    array = DistArray(on(grid, values[grid.rank]), (n,), Layout(None, partial=("row",)), grid)
    alone = start_redistribution([array], [target])
    beside = start_redistribution([spread(integers(n // 3), grid, array.layout), array], [target] * 2)
    for moved in (alone.wait()[0], beside.wait()[1]):
        assert np.array_equal(host(moved), exact[slice(*moved.box[0])])


@pytest.mark.grids({"row": 3}, {"row": 2})
def test_done_brings_both_phases_to_their_end(grid):
    moving = start_redistribution([spread(integers(50), grid, Layout(None, partial=("row",)))], [Layout(None)])
    deadline = time.monotonic() + 30
    while not moving.done():
        assert time.monotonic() < deadline
    with ledger.record() as moved:
        (whole,) = moving.wait()
    assert not moved.events  # nothing was left to do
    assert not astray({"": whole}, integers(50))


@pytest.mark.grids({"row": 2}, {"row": 3})
def test_an_event_has_the_times_of_begin_wait_and_end(grid):
    array = from_global(integers((6, 4)), grid, Layout("row", None))
    with ledger.record() as moved:
        begun = time.perf_counter()
        moving = start_redistribution([array], [Layout(None, None)])
        with ledger.span("forward", layer="between"):
            np.linalg.norm(np.ones((200, 200)))
        waited = time.perf_counter()
        moving.wait()
    (event,), (span,) = moved.events, moved.spans
    assert (event.op, event.axes, event.words) == ("allgather", ("row",), 24 - array.local.size)
    assert begun <= event.begun <= event.posted <= span.begun <= span.ended <= waited <= event.waited <= event.ended
    assert (span.kind, span.what, span.depth) == ("forward", {"layer": "between"}, 0)
    assert event.seconds == (event.posted - event.begun) + (event.ended - event.waited)
    assert event.site.split(":")[0] == __file__
    with ledger.record() as moved:
        array.redistribute(Layout(None, None))
    assert all(event.begun == event.posted == event.waited < event.ended for event in moved.events)


def test_spans_nest():
    with ledger.record() as moved, ledger.span("forward", microbatch=1), ledger.span("forward", layer="y"):
        pass
    assert [(span.depth, span.what) for span in moved.spans] == [(1, {"layer": "y"}), (0, {"microbatch": 1})]


@pytest.mark.grids({"row": 2, "col": 2})
def test_groups_of_a_sub_grid_count_on_from_their_parents(grid):
    place = grid.at(row=grid.coords["row"])
    numbers = grid.next_number(("col",)), place.next_number(("col",)), grid.next_number(("col",))
    assert numbers == tuple(range(numbers[0], numbers[0] + 3))
    assert len(set(comm.collect(numbers, grid))) == 1


@pytest.mark.grids({"row": 2})
def test_each_array_needs_a_layout(grid):
    array = from_global(np.arange(6.0), grid, Layout("row"))
    with pytest.raises(LayoutError, match="2 arrays and 1 layouts; give each array one layout"):
        start_redistribution([array, array], [Layout(None)])
