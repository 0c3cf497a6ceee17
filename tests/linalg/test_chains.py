"""In a chain of products, operands in place stay, and partial sums are reduced into the next layout."""

import numpy as np
import pytest

from colossal_mpi import Layout, from_global, ledger
from colossal_mpi.linalg import contract, matmul, options, price
from colossal_mpi.linalg.contraction import execute
from tests.cases import host, integers
from tests.linalg.execution import EXECUTIONS, execute_as

GEMM = "mk,kn->mn"
CUBE = {"row": 2, "col": 2, "depth": 2}


@pytest.mark.grids(CUBE)
def test_partial_sums_are_reduced_straight_into_the_layout_of_the_next_product(grid):
    a, b, e = integers((9, 10), seed=1), integers((10, 7), seed=2), integers((7, 5), seed=3)
    A, B = from_global(a, grid, Layout("row", "depth")), from_global(b, grid, Layout("depth", "col"))
    E = from_global(e, grid, Layout(("col", "row"), "depth"))
    C = contract(GEMM, A, B, {"row": "m", "col": "n", "depth": "k"})
    assert C.layout.partial == ("depth",)
    axes, out = {"row": "m", "depth": "m", "col": "k"}, Layout(("row", "depth", "col"), None)
    with ledger.record() as moved:
        D = contract(GEMM, C, E, axes, out)
    assert np.array_equal(D.gather(), a @ b @ e)
    of_c = [event for event in moved.events if event.axes == ("depth",) and event.op == "reduce_scatter"]
    assert [event.words for event in of_c] == [host(C.redistribute(Layout(("row", "depth"), "col")).local).size]
    extents = {"m": 9, "k": 7, "n": 5}
    assert moved.words == price(GEMM, extents, grid.axes, axes, C.layout, E.layout, out).words[grid.rank]


@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize("execution", ["whole", "message", "k-message"])
def test_an_operand_in_place_is_never_copied(grid, execution, monkeypatch):
    panels, seen, accumulate = execute_as(execution, grid, monkeypatch), [], execute.accumulate
    A = from_global(integers((9, 10)), grid, Layout("row", None))
    B = from_global(integers((10, 7)), grid, Layout(None, ("col", "row")))

    def watched(sub, a, b, *rest):
        seen.append(a is A.local or getattr(a, "base", None) is A.local)
        accumulate(sub, a, b, *rest)

    monkeypatch.setattr(execute, "accumulate", watched)
    with ledger.record() as moved:
        contract(GEMM, A, B, {"row": "m", "col": "n"}, **panels)
    assert {event.axes for event in moved.events} == {("row",)}
    assert seen
    assert grid.device != "cpu" or all(seen)


@pytest.mark.grids({"row": 2, "col": 2})
def test_auto_prices_the_move_of_a_badly_stored_operand(grid):
    """The long operand is cut along the wrong dim: moving it costs more than reducing the result."""
    a, b = integers((8, 4000), seed=1), integers((4000, 8), seed=2)
    A, B = from_global(a, grid, Layout(None, ("row", "col"))), from_global(b, grid, Layout(("row", "col"), None))
    best = options(GEMM, A, B, Layout(None, None))[0]
    assert best.axes == {"row": "k", "col": "k"}
    with ledger.record() as moved:
        C = matmul(A, B, "auto", Layout(None, None))
    assert np.array_equal(C.gather(), a @ b)
    assert moved.words <= 2 * 64


@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_floats_are_summed_in_float32(grid, execution, dtype, monkeypatch):
    """In 16 bits a sum of ones would stay at 2048 or 256, because the next number is more than 1 away."""
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    panels = {**execute_as(execution, grid, monkeypatch, 16)}
    a, b = np.ones((5, 4096), kind), np.ones((4096, 3), kind)
    for axes in ({"row": "m", "col": "n"}, {"row": "k", "col": "n"}, {"row": "k", "col": "k"}):
        A, B = from_global(a, grid, Layout("row", "col")), from_global(b, grid, Layout(("col", "row"), None))
        C = contract(GEMM, A, B, axes, Layout("row", "col"), **panels)
        assert C.dtype == kind
        assert (host(C.local).astype("float32") == 4096).all(), axes
