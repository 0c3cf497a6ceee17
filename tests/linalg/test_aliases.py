"""Products are right when their arrays share memory or plans are reused, and replicas have the same bits."""

import numpy as np
import pytest

from colossal_mpi import DTypeError, Layout, comm, from_global, linalg, zeros
from colossal_mpi.comm import reading
from colossal_mpi.linalg import contract
from colossal_mpi.linalg.contraction import operands
from colossal_mpi.linalg.verify import Check
from tests.cases import host, integers, refusal
from tests.linalg.execution import EXECUTIONS, execute_as

GEMM, MAP = "mk,kn->mn", {"row": "m", "col": "n"}
SQUARE, BLOCKS = {"row": 2, "col": 2}, Layout("row", "col")

in_every_way = [pytest.mark.grids(SQUARE), pytest.mark.parametrize("execution", EXECUTIONS)]


def everywhere(test):
    for mark in in_every_way:
        test = mark(test)
    return test


@everywhere
def test_both_operands_may_have_the_same_letters(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    if panels:
        panels["stream"] = "k"
    a, b = integers((6, 9), seed=1), integers((6, 9), seed=2)
    A, B = from_global(a, grid, BLOCKS), from_global(b, grid, BLOCKS)
    for axes in ({}, {"row": "b"}, {"col": "k"}, {"row": "k", "col": "b"}):
        c = contract("bk,bk->b", A, B, axes, Layout(None), **panels)
        assert np.array_equal(host(c), np.einsum("bk,bk->b", a, b)), axes
        assert np.array_equal(contract("bk,bk->", A, B, axes, Layout(), **panels).gather(), np.sum(a * b)), axes


@everywhere
def test_the_result_may_be_written_over_an_operand_or_a_view_of_it(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    a, b = integers((7, 7), seed=1), integers((7, 7), seed=2)
    for layout in (BLOCKS, Layout(None, None)):
        for over in (lambda A, B: A, lambda A, B: B, lambda A, B: A.T, lambda A, B: B[:, :]):
            for axes in (MAP, {}, {"row": "k"}):
                A, B = from_global(a, grid, layout), from_global(b, grid, layout)
                before = over(A, B).gather()
                made = contract(GEMM, A, B, axes, over(A, B), alpha=2, beta=3, **panels)
                assert np.array_equal(made.gather(), 2 * (a @ b) + 3 * before), (layout, axes)


@everywhere
def test_a_product_does_not_use_the_plans_of_another(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    for dtype in ("float64", "int64"):
        a, b = integers((8, 8), dtype, 1), integers((8, 8), dtype, 2)
        A, B = from_global(a, grid, BLOCKS), from_global(b, grid, Layout("col", "row"))
        for subscripts in ("mk,kn->mn", "mk,kn->nm", "km,kn->mn", "mk,nk->nm", "km,nk->mn"):
            for axes in (MAP, {"row": "m", "col": "k"}, {"row": "k", "col": "n"}):
                made = contract(subscripts, A, B, axes, BLOCKS, **panels)
                assert np.array_equal(made.gather(), np.einsum(subscripts, a, b)), (subscripts, axes)


@pytest.mark.grids(SQUARE, {"row": 2, "col": 3})
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_ranks_that_do_the_same_product_get_the_same_bits(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((23, 301)), rng.standard_normal((301, 17))
    A, B = from_global(a, grid, BLOCKS), from_global(b, grid, Layout("col", "row"))
    for axes in ({}, {"row": "m"}, {"col": "n"}, {"row": "k"}):
        c = contract(GEMM, A, B, axes, Layout(None, None), **panels)
        assert len(set(comm.collect(host(c).tobytes(), grid))) == 1, axes


@pytest.mark.grids({"col": 2})
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        ("uint8", {"alpha": -1}),
        ("int64", {"alpha": 0.5}),
        ("float32", {"alpha": 1j}),
        ("int32", {"alpha": float("nan")}),
    ],
    ids=str,
)
def test_a_factor_that_the_dtype_cannot_hold_is_an_error_on_all_ranks(grid, dtype, factors):
    """Rank 1 has no row: alone, it would see no error and wait for the others."""
    A, B = zeros((1, 40), grid, Layout(None, "col"), dtype), zeros((40, 30), grid, Layout("col", None), dtype)
    kind, text = refusal(lambda: contract(GEMM, A, B, {"col": "m"}, **factors), grid)
    assert kind is DTypeError
    assert f"is no {dtype}: cast the operands" in text


@everywhere
def test_with_alpha_0_the_operands_are_not_read(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    A, C = from_global(np.full((7, 7), np.nan), grid, BLOCKS), from_global(integers((7, 7)), grid, BLOCKS)
    contract(GEMM, A, A, MAP, C, alpha=0, beta=2, **panels)
    assert np.array_equal(C.gather(), 2 * integers((7, 7)))


@pytest.mark.grids(SQUARE)
def test_the_memory_that_is_kept_is_bounded(grid, monkeypatch):
    execute_as("k-message", grid, monkeypatch)
    monkeypatch.setattr(operands, "KEPT", 20_000)
    operands.WORKSPACES.of(grid).clear()
    for n in range(20, 60):
        A = zeros((n, n), grid, BLOCKS)
        contract(GEMM, A, A, MAP, stream="k", panel=8)
    spaces = operands.WORKSPACES.of(grid)
    assert 1 < len(spaces) < 40
    assert sum(space.nbytes for kind in spaces.values() for space in kind.values()) < 2 * 20_000


@pytest.mark.grids({"col": 3})
def test_an_exception_of_one_rank_that_reads_leaves_no_rank_waiting(grid):
    if grid.peers(("col",)) is None:
        return

    def read():
        with reading(np.ones(3), grid, ("col",), [(3,)] * 3, 0):
            if grid.rank == 1:
                raise DTypeError("overflow")

    def agreed():
        with comm.agreed(grid):
            read()

    assert refusal(agreed, grid) == (DTypeError, "overflow")


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int64", "complex64"])
def test_verify_knows_the_dtype(grid, dtype):
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    a = (np.full((40, 40), 12) + integers((40, 40))).astype(kind)
    A = from_global(a, grid, BLOCKS)
    C = linalg.matmul(A, A, verify=True)
    check = Check(GEMM, A, A)
    if grid.rank == 3:
        C.local[...] += C.local
    refusal(lambda: check.passes(C), grid)
