"""The ledger records the words, times and call site of every collective, in nested records."""

import inspect

import pytest

from colossal_mpi import Layout, full, ledger, linalg

ROW, COL, WHOLE = Layout("col", None), Layout(None, "col"), Layout(None, None)
on_two_by_two = pytest.mark.grids({"row": 2, "col": 2})


def here():
    """Return ``file:line`` of the caller, as the ledger writes it."""
    frame = inspect.currentframe().f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@on_two_by_two
def test_an_event_says_what_one_collective_moved(grid):
    array = full((4, 6), 1, grid, ROW, "float32")
    with ledger.record() as moved:
        array.redistribute(WHOLE)
    (event,) = moved.events
    assert (event.op, event.axes, event.axis, event.words, event.bytes) == ("allgather", ("col",), "col", 12, 48)
    assert event.seconds > 0


@on_two_by_two
def test_the_site_is_the_caller_outside_the_communication_code(grid):
    array = full((4, 6), 1, grid, ROW)
    with ledger.record() as moved:
        _, first = array.redistribute(WHOLE), here()
        _, second = array.norm(), here()
        _, third = array.gather(0), here()
    assert [event.site for event in moved.events] == [first, second, third]


@on_two_by_two
def test_the_site_of_a_product_is_where_contract_moves(grid):
    array = full((4, 4), 1, grid, ROW)
    with ledger.record() as moved:
        array @ array
    assert moved.events
    files = {event.site.rsplit(":", 1)[0] for event in moved.events}
    assert files == {inspect.getsourcefile(linalg.contract)}
    assert inspect.getmodule(linalg.contract).__name__ == "colossal_mpi.linalg.contraction.contract"


@on_two_by_two
def test_records_nest_and_keep_their_own_sums(grid):
    array = full((4, 6), 1, grid, ROW)
    with ledger.record() as outer:
        array.redistribute(WHOLE)
        with ledger.record() as inner:
            array.redistribute(COL)
        array.sum()
    assert [event.words for event in inner.events] == [6]
    assert [event.words for event in outer.events] == [12, 6, 1]
    assert inner.events[0] is outer.events[1]


@on_two_by_two
def test_sums_are_those_of_the_events(grid):
    array = full((4, 6), 1, grid, Layout("row", "col"))
    with ledger.record() as moved:
        array.redistribute(Layout("row", None))
        array.redistribute(Layout(None, "col"))
        array.redistribute(WHOLE)
    assert moved.words == sum(event.words for event in moved.events) == 6 + 6 + 18
    assert moved.bytes == 8 * moved.words
    assert moved.seconds == sum(event.seconds for event in moved.events) > 0
    assert moved.by_axis() == {"col": 6, "row": 6, "row,col": 18}


@on_two_by_two
def test_nothing_is_recorded_outside(grid):
    array = full((4, 6), 1, grid, ROW)
    with ledger.record() as moved:
        pass
    array.redistribute(WHOLE)
    assert (moved.events, moved.words, moved.bytes, moved.seconds, moved.by_axis()) == ([], 0, 0, 0, {})
    assert not ledger._open


@on_two_by_two
def test_a_record_closes_when_its_block_fails(grid):
    array = full((4, 6), 1, grid, ROW)
    with pytest.raises(RuntimeError, match="stop"), ledger.record() as moved:
        raise RuntimeError("stop")
    array.redistribute(WHOLE)
    assert not moved.events
