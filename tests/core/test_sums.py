"""Every way to sum over ranks gives the bits of the NumPy sum in the order of the ranks: ((0 + 1) + 2) + ..."""

import numpy as np
import pytest

from colossal_mpi import DistArray, Layout, comm, ledger
from colossal_mpi.comm import collectives, transport
from colossal_mpi.distarray import start_redistribution
from colossal_mpi.layout import part
from colossal_mpi.platform import shared_memory
from colossal_mpi.redistribution import execute
from tests.cases import host, on

AXES = ("x",)
SHAPE = (37, 5)
GRIDS = pytest.mark.grids({"x": 2}, {"x": 3}, {"x": 4}, {"x": 5})
DTYPES = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
PARTIAL, REPLICATED, CUT = Layout(None, None, partial=AXES), Layout(None, None), Layout("x", None)


def term(rank, dtype, seed=0):
    """Return the term of a rank; magnitudes differ by element and rank, so that the order decides the bits."""
    rng = np.random.default_rng([seed, rank])
    span = 4 if dtype == "float16" else 12
    return (rng.standard_normal(SHAPE) * 2.0 ** rng.integers(-span, span, SHAPE)).astype(dtype)


def in_rank_order(size, dtype, seed=0):
    """Return the expected sum; float16 is summed in float32 and rounded once."""
    wide = "float32" if dtype == "float16" else dtype
    total = term(0, dtype, seed).astype(wide)
    for rank in range(1, size):
        total = total + term(rank, dtype, seed).astype(wide)
    return total.astype(dtype)


def partial(grid, dtype, seed=0):
    block = grid.to_block(term(grid.rank, dtype, seed))
    return DistArray(block, SHAPE, PARTIAL, grid)


def small(grid, monkeypatch):
    monkeypatch.setattr(collectives, "_LARGE", 1 << 30)
    monkeypatch.setattr(grid, "shares", False)


def large(grid, monkeypatch):
    monkeypatch.setattr(collectives, "_LARGE", 1)
    monkeypatch.setattr(grid, "shares", False)


def chunks(grid, monkeypatch):
    large(grid, monkeypatch)
    monkeypatch.setattr(collectives, "_CHUNK", 56)


def read(grid, monkeypatch):
    monkeypatch.setattr(execute, "READ_FROM", 0)
    monkeypatch.setattr(shared_memory, "LEAST", 0)


def blocking(array, target):
    return array.redistribute(target)


def started(array, target):
    return start_redistribution([array], [target]).wait()[0]


def bucketed(array, target):
    beside = [partial(array.grid, array.dtype, seed) for seed in (1, 2)]
    return start_redistribution([beside[0], array, beside[1]], [target] * 3).wait()[1]


WAYS = {
    "small": (small, blocking),
    "large": (large, blocking),
    "chunks": (chunks, blocking),
    "read": (read, blocking),
    "started": (small, started),
    "bucketed": (small, bucketed),
}
on_ways = pytest.mark.parametrize(("settings", "reduce"), WAYS.values(), ids=WAYS)


@GRIDS
@DTYPES
@on_ways
def test_every_way_adds_in_the_order_of_the_ranks(grid, dtype, settings, reduce, monkeypatch):
    settings(grid, monkeypatch)
    exact = in_rank_order(grid.size, dtype)
    for target in (CUT, REPLICATED):
        with ledger.record() as moved:
            total = reduce(partial(grid, dtype), target)
        assert host(total).tobytes() == exact[slice(*total.box[0])].tobytes(), target
        if settings is read and target is CUT and dtype != "float16" and grid.peers(AXES) is not None:
            assert [event.op for event in moved.events] == ["read"]


@GRIDS
@DTYPES
@pytest.mark.parametrize("settings", [small, large, chunks])
def test_collectives_add_in_the_order_of_the_ranks(grid, dtype, settings, monkeypatch):
    settings(grid, monkeypatch)
    mine, exact = on(grid, term(grid.rank, dtype).reshape(-1)), in_rank_order(grid.size, dtype).reshape(-1)
    low, high = part(exact.size, grid.size, grid.rank)
    counts = [stop - start for start, stop in (part(exact.size, grid.size, r) for r in range(grid.size))]
    assert host(comm.allreduce(mine, grid, AXES)).tobytes() == exact.tobytes()
    assert host(comm.reduce_scatter(mine, grid, AXES, counts)).tobytes() == exact[low:high].tobytes()


def backwards(add):
    def add_backwards(terms, out, op=comm.SUM):
        return add([term.copy() for term in terms[::-1]], out, op)

    return add_backwards


@pytest.mark.grids({"x": 3}, {"x": 5})
@on_ways
def test_another_order_is_seen(grid, settings, reduce, monkeypatch):
    wrong = backwards(comm.add_in_rank_order)
    for module in (collectives, transport, execute):
        monkeypatch.setattr(module, "add_in_rank_order", wrong)
    with pytest.raises(AssertionError):
        test_every_way_adds_in_the_order_of_the_ranks(grid, "float64", settings, reduce, monkeypatch)
