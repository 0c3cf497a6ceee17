"""A buffer that is too long for one MPI message is split, and results and words stay the same."""

import numpy as np
import pytest

from colossal_mpi import Layout, comm, from_global, ledger
from colossal_mpi.comm import collectives
from colossal_mpi.grid import Grid
from tests.cases import host, integers, on, represents

LIMIT = 1000
GRIDS = pytest.mark.grids({"x": 2}, {"x": 3}, {"x": 4})
AXES = ("x",)
COUNTS = {2: [2501, 1999], 3: [0, 3001, 1000], 4: [1, 2345, 0, 999]}


def ragged(grid):
    """Return the number of elements that each rank sends to each rank."""
    return np.array([[(700 * (s + 2 * d + 1)) % 3001 for d in range(grid.size)] for s in range(grid.size)])


def all_to_all(grid, most):
    counts, me = ragged(grid), grid.rank
    block = on(grid, integers(int(counts[me].sum()), seed=me))
    bound = int(max(counts.sum(0).max(), counts.sum(1).max())) if most else None
    return comm.all_to_all(block, grid, AXES, counts[me].tolist(), counts[:, me].tolist(), bound)


def allgather(grid):
    counts = COUNTS[grid.size]
    return comm.allgather(on(grid, integers(counts[grid.rank], seed=grid.rank)), grid, AXES, counts)


def reduce_scatter(grid, dtype="float64"):
    counts = COUNTS[grid.size]
    return comm.reduce_scatter(on(grid, integers(sum(counts), dtype, grid.rank)), grid, AXES, counts)


CALLS = {
    "allgather": allgather,
    "reduce_scatter": reduce_scatter,
    "halves": lambda g: reduce_scatter(g, "float16"),
    "allreduce": lambda g: comm.allreduce(on(g, integers((61, 83), seed=g.rank)), g, AXES),
    "all_to_all": lambda g: all_to_all(g, True),
    "all_to_all-unbounded": lambda g: all_to_all(g, False),
    "bcast": lambda g: comm.bcast(on(g, integers((61, 83), seed=g.rank)), g, AXES, 1),
}


class Counted:
    """A communicator that checks the number of elements of each message."""

    def __init__(self, comm):
        self._comm = comm

    def __getattr__(self, name):
        found = getattr(self._comm, name)
        return found if name[0].islower() or not callable(found) else lambda *args: self._call(found, args)

    def _call(self, call, args):
        for arg in args:
            if isinstance(arg, list) and arg and hasattr(arg[0], "dtype"):
                assert arg[0].size <= LIMIT, f"{call.__name__} of {arg[0].size} elements"
        return call(*args)


@GRIDS
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_results_and_words_are_those_of_whole_messages(grid, monkeypatch, call):
    with ledger.record() as whole:
        expected = host(call(grid))
    plain = Grid.comm
    monkeypatch.setattr(collectives, "_LIMIT", LIMIT)
    monkeypatch.setattr(Grid, "comm", lambda self, axes: Counted(plain(self, axes)))
    with ledger.record() as cut:
        result = host(call(grid))
    assert np.array_equal(result, expected)
    assert result.shape == expected.shape
    assert [(e.op, e.words, e.bytes) for e in cut.events] == [(e.op, e.words, e.bytes) for e in whole.events]


@pytest.mark.grids({"row": 2, "col": 3})
def test_arrays_move_between_layouts_in_cut_messages(grid, monkeypatch):
    plain, whole = Grid.comm, integers((97, 83))
    array = from_global(whole, grid, Layout("row", "col"))
    monkeypatch.setattr(collectives, "_LIMIT", LIMIT)
    monkeypatch.setattr(Grid, "comm", lambda self, axes: Counted(plain(self, axes)))
    moved = array.redistribute(Layout(("col", "row"), None)).redistribute(Layout(None, "row"))
    gathered = moved.gather(0), (moved @ moved.T.redistribute(Layout("col", None))).gather()
    monkeypatch.setattr(Grid, "comm", plain)
    assert represents(moved, whole)
    assert grid.rank or np.array_equal(gathered[0], whole)
    assert np.array_equal(gathered[1], whole @ whole.T)
