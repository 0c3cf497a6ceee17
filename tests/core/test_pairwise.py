"""Large pieces, which go from rank to rank, give the same results as the MPI collectives."""

import numpy as np
import pytest

from colossal_mpi import comm, ledger
from colossal_mpi.comm import collectives
from tests.cases import host, integers, on

COUNTS = {2: [5, 0], 3: [4, 0, 3], 4: [1, 6, 0, 2]}
GRIDS = pytest.mark.grids({"x": 2}, {"x": 3}, {"x": 4})


@pytest.fixture(params=["small", "large"])
def both(request, monkeypatch):
    monkeypatch.setattr(collectives, "_LARGE", 1 << 30 if request.param == "small" else 1)


@pytest.mark.smoke
@GRIDS
@pytest.mark.parametrize("dtype", ["float16", "float64", "complex128", "int32"])
def test_allgather_and_reduce_scatter(grid, both, dtype):
    counts, me = COUNTS[grid.size], grid.rank
    parts = [integers((n,), dtype, seed=r) for r, n in enumerate(counts)]
    terms = [integers((sum(counts),), dtype, seed=r) for r in range(grid.size)]
    start = sum(counts[:me])
    with ledger.record() as moved:
        whole = comm.allgather(on(grid, parts[me]), grid, ("x",), counts)
        own = comm.reduce_scatter(on(grid, terms[me]), grid, ("x",), counts)
    assert np.array_equal(host(whole), np.concatenate(parts))
    assert np.array_equal(host(own), sum(terms)[start : start + counts[me]])
    assert own.dtype == whole.dtype == np.dtype(dtype)
    assert [event.words for event in moved.events] == [sum(counts) - counts[me], (grid.size - 1) * counts[me]]


@GRIDS
def test_pieces_may_land_out_of_order_and_maxima_are_taken(grid, both):
    counts, me = COUNTS[grid.size], grid.rank
    starts = [sum(counts[r + 1 :]) for r in range(grid.size)]
    whole = comm.allgather(on(grid, np.full(counts[me], me)), grid, ("x",), counts, starts)
    expected = np.concatenate([np.full(n, r) for r, n in reversed(list(enumerate(counts)))])
    assert np.array_equal(host(whole), expected)
    terms = [integers((sum(counts),), seed=r) for r in range(grid.size)]
    own = comm.reduce_scatter(on(grid, terms[me]), grid, ("x",), counts, comm.MAX)
    assert np.array_equal(host(own), np.max(terms, axis=0)[sum(counts[:me]) :][: counts[me]])


@GRIDS
def test_allreduce_leaves_the_same_bits_everywhere(grid, both):
    mine = np.random.default_rng(grid.rank).standard_normal((5, 3))
    total = host(comm.allreduce(on(grid, mine), grid, ("x",)))
    assert len(set(comm.collect(total.tobytes(), grid))) == 1
    assert np.allclose(total, sum(np.random.default_rng(r).standard_normal((5, 3)) for r in range(grid.size)))
