"""Ranks that make different calls raise the same error, which names two of them and their lines, before data move."""

import re

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Layout, MismatchError, comm, from_global, full, linalg, random
from colossal_mpi.comm import check
from colossal_mpi.distarray import start_redistribution
from tests.cases import refusal

ROWS, COLUMNS, WHOLE = Layout("row", None), Layout(None, "row"), Layout(None, None)
two = pytest.mark.grids({"row": 2})


@pytest.fixture(autouse=True)
def _checked():
    with comm.checked():
        yield


def ones(grid, n=6, dtype="float64", layout=ROWS):
    return full((n, n), 1.0, grid, layout, dtype)


def block(grid):
    return np.full(6, grid.rank + 1.0)


CASES = {
    "dtype": lambda grid, odd: ones(grid, dtype="float32" if odd else "float64").redistribute(WHOLE),
    "shape": lambda grid, odd: ones(grid, 8 if odd else 6).redistribute(COLUMNS),
    "layout": lambda grid, odd: ones(grid).redistribute(COLUMNS if odd else WHOLE),
    "messages": lambda grid, odd: start_redistribution([ones(grid, 8 if odd else 6)], [WHOLE]).wait(),
    "reduction": lambda grid, odd: comm.allreduce(block(grid), grid, ["row"], "max" if odd else "sum"),
    "root": lambda grid, odd: comm.bcast(block(grid), grid, ["row"], root=int(odd)),
    "count": lambda grid, odd: comm.allreduce(block(grid)[: 5 if odd else 6], grid, ["row"]),
    "operation": lambda grid, odd: comm.collect(1, grid) if odd else comm.share(1, grid),
    "values": lambda grid, odd: from_global(np.full((6, 6), 1.0 + odd), grid, ROWS),
    "seed": lambda grid, odd: random.normal((6, 6), grid, ROWS, seed=int(odd)),
    "product": lambda grid, odd: linalg.matmul(ones(grid), ones(grid, layout=COLUMNS if odd else ROWS)),
}


@two
@pytest.mark.parametrize("case", CASES)
def test_calls_that_differ_are_one_error_on_all_ranks(grid, case):
    kind, text = refusal(lambda: CASES[case](grid, grid.rank == 1), grid)
    assert kind is MismatchError
    lines = re.findall(r"at (\S+):(\d+)", text)
    assert text.startswith("ranks 0 and 1 make different calls: ")
    assert [path for path, _ in lines] == [__file__] * 2


@two
def test_a_call_that_one_rank_skips_meets_its_next_call(grid):
    a, c = ones(grid), ones(grid)

    def program():
        if grid.rank == 0:
            a.sum()
        c.sum()

    _, text = refusal(program, grid)
    skipped, other = (int(line) for line in re.findall(r"test_check.py:(\d+)", text))
    assert other == skipped + 1


@two
def test_calls_of_one_line_in_another_order_are_told_apart(grid):
    a, c = ones(grid), ones(grid)
    kind, _ = refusal(lambda: (a.sum(), c.norm()) if grid.rank else (c.norm(), a.sum()), grid)
    assert kind is MismatchError


@pytest.mark.grids({"row": 3})
def test_pieces_that_do_not_fit_are_told_on_all_ranks(grid):
    counts = [1, 2, 3]
    expected = [counts[grid.rank]] * 3
    if grid.rank == 2:
        expected[1] = 9
    kind, text = refusal(lambda: comm.all_to_all(block(grid), grid, ["row"], counts, expected), grid)
    assert kind is MismatchError
    assert "rank 1 sends 3 elements to rank 2, which expects 9" in text


@pytest.mark.grids({"row": 2, "col": 2})
def test_checked_calls_have_the_same_results(grid):
    whole = np.arange(35.0).reshape(7, 5)
    a = from_global(whole, grid, Layout("row", "col"))
    moved = start_redistribution([a], [Layout("col", None)])
    product = linalg.matmul(a, a.T)
    assert np.array_equal(moved.wait()[0].gather(), whole)
    assert np.abs(product.gather() - whole @ whole.T).max() < 1e-10
    assert comm.collect(grid.rank, grid) == [0, 1, 2, 3]


@pytest.mark.grids({"row": 2, "col": 2})
def test_a_rank_that_calls_along_another_axis_is_told_to_all_ranks(grid):
    for axis in grid.axes:
        comm.allreduce(block(grid), grid, [axis])

    def program():
        comm.allreduce(block(grid), grid, ["row" if grid.rank == 1 else "col"])  # 0 waits for 1, and 1 for 3
        comm.collect(0, grid)

    with pytest.raises(MismatchError, match="make different calls"):
        program()
    _drop_messages()


def _drop_messages():
    """Receive the records that no rank waits for any more, which the next test must not meet."""
    world = MPI.COMM_WORLD
    world.Barrier()
    while world.Iprobe(MPI.ANY_SOURCE, check._tag()):
        world.Recv([bytearray(4096), MPI.BYTE], MPI.ANY_SOURCE, check._tag())
    world.Barrier()
