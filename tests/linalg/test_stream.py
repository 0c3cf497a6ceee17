"""Products in panels overlap messages and gemms, reuse their buffers, and take no more memory than predicted."""

import tracemalloc

import numpy as np
import pytest

from colossal_mpi import Layout, ShapeError, VerificationError, from_global, ledger, linalg, random
from colossal_mpi.comm import Pending
from colossal_mpi.grid import GridCache
from colossal_mpi.linalg.contraction import execute
from colossal_mpi.linalg.contraction import operands as operands_module
from colossal_mpi.linalg.matmul import ALGORITHMS
from colossal_mpi.linalg.model.auto import options
from colossal_mpi.platform import shared_memory
from tests.cases import host, integers, refusal
from tests.linalg.execution import execute_as

SQUARE, CUBE = {"row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2}
STREAMED = ["summa", "summa-a", "summa-b", "2.5d", "3d", "1d-column", "1d-row"]


def operands(grid, name, m, k, n):
    choice = linalg.preset(name, grid)
    a = random.normal((m, k), grid, choice.a, stream="a")
    return choice, a, random.normal((k, n), grid, choice.b, stream="b")


@pytest.mark.grids(SQUARE, {"row": 2, "col": 3}, {"row": 1, "col": 4}, CUBE, {"col": 3})
@pytest.mark.parametrize("way", ["k-read", "k-message"])
@pytest.mark.parametrize("panel", [1, 4, 100])
def test_every_algorithm_in_panels_is_exact_and_moves_the_same_words(grid, way, panel, monkeypatch):
    execute_as(way, grid, monkeypatch)
    a, b = integers((7, 33), seed=1), integers((33, 9), seed=2)
    for name, choice in ALGORITHMS.items():
        if not choice.fits(grid):
            continue
        stored = linalg.preset(name, grid)
        A, B = from_global(a, grid, stored.a), from_global(b, grid, stored.b)
        with ledger.record() as whole:
            linalg.matmul(A, B, name)
        with ledger.record() as panels:
            C = linalg.matmul(A, B, name, panel=panel)
        assert np.array_equal(C.gather(), a @ b), name
        assert C.layout == stored.c.on(grid.axes, 2)
        assert panels.words == whole.words, name


@pytest.mark.grids(SQUARE)
def test_the_next_panel_is_under_way_while_one_is_multiplied(grid, monkeypatch):
    execute_as("k-message", grid, monkeypatch)
    seen, start, accumulate, wait = [], operands_module.start_exchange, execute.accumulate, Pending.wait
    monkeypatch.setattr(operands_module, "start_exchange", lambda *args: (seen.append("post"), start(*args))[1])
    monkeypatch.setattr(Pending, "wait", lambda self: (seen.append("wait"), wait(self))[1])
    monkeypatch.setattr(execute, "accumulate", lambda *args: (seen.append("multiply"), accumulate(*args))[1])
    _, A, B = operands(grid, "summa", 6, 12, 6)
    linalg.matmul(A, B, "summa", panel=3)
    first = ["post", "wait", "post", "wait"]
    then = ["post", "post", "multiply", "wait", "wait"]
    assert seen == [*first, *then, *then, *then, "multiply"]


@pytest.mark.grids(CUBE)
@pytest.mark.parametrize("name", STREAMED[:5])
@pytest.mark.parametrize("size", [(240, 200, 280), (200, 513, 130)], ids=str)
def test_memory_stays_within_the_prediction_and_is_kept(grid, name, size, monkeypatch):
    """Blocks are in ordinary memory and tiles come by message, so that tracemalloc sees every allocation of NumPy."""
    if grid.device != "cpu":
        pytest.skip("host memory for staging is not workspace on the device")
    monkeypatch.setattr(grid, "shares", False)
    monkeypatch.setattr(shared_memory, "LEAST", 1 << 60)
    axes = {axis: at for axis, at in grid.axes.items() if axis != "depth"} if name.startswith("summa") else {}
    on = grid.at(depth=grid.coords["depth"]) if axes else grid
    monkeypatch.setattr(on, "shares", False)
    choice, A, B = operands(on, name, *size)
    extents = dict(zip("mkn", size, strict=True))
    cost = linalg.price(
        "mk,kn->mn", extents, on.axes, choice.axes, choice.a, choice.b, choice.c, stream=choice.stream, panel=32
    )
    result = linalg.matmul(A, B, name, panel=32)  # fills the caches of plans
    tracemalloc.start()
    again = linalg.matmul(A, B, name, panel=32)
    kept = tracemalloc.get_traced_memory()[1] / 8 - again.local.size
    tracemalloc.stop()
    GridCache.forget(on)
    tracemalloc.start()
    linalg.matmul(A, B, name, panel=32)
    first = tracemalloc.get_traced_memory()[1] / 8 - again.local.size
    tracemalloc.stop()
    small = 60_000 / 8  # Python's own objects, plans among them
    assert np.array_equal(host(again.local), host(result.local))
    assert first <= cost.workspace + small
    assert cost.workspace < (0.9 if choice.axes.get("depth") else 0.8) * _whole(extents, on, choice)
    if name == "summa":
        assert kept <= small


def _whole(extents, grid, choice):
    return linalg.price("mk,kn->mn", extents, grid.axes, choice.axes, choice.a, choice.b, choice.c).workspace


@pytest.mark.grids(SQUARE)
def test_a_tight_memory_makes_auto_stream(grid):
    _, A, B = operands(grid, "summa", 320, 320, 320)
    whole = options("mk,kn->mn", A, B, Layout("row", "col"))[0]
    tight = options("mk,kn->mn", A, B, Layout("row", "col"), memory=whole.price.workspace // 3)[0]
    assert whole.stream is None
    assert tight.stream is not None
    assert tight.price.workspace <= whole.price.workspace // 3
    C = tight.run("mk,kn->mn", A, B)
    assert (C - A @ B).norm() <= 1e-13 * C.norm() * 320


@pytest.mark.grids(SQUARE)
def test_verify_finds_one_wrong_element(grid):
    _, A, B = operands(grid, "summa", 33, 20, 27)
    linalg.matmul(A, B, verify=True)
    check = linalg.verify.Check("mk,kn->mn", A, B)
    C = A @ B
    if grid.rank == 2:
        C.local[1, 3] += 1e-6
    kind, text = refusal(lambda: check.passes(C), grid)
    assert kind is VerificationError
    assert "of its norm, and 4.44e-15 is allowed" in text


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream": "q"}, "stream='q' is no letter of it; use one of m, k, n"),
        ({"stream": "k", "panel": 0}, "panel=0: a panel has at least one index"),
        ({"beta": 2}, "beta=2 needs an array out= to be added to"),
        ({"alpha": 1j}, "alpha=1j is no float64: cast the operands with .astype first"),
        ({"conj": "c"}, "conj='c': name the operands to conjugate, 'a', 'b' or 'ab'"),
    ],
    ids=lambda x: str(x),
)
def test_bad_options_are_errors_on_all_ranks(grid, options, message):
    _, A, B = operands(grid, "summa", 5, 5, 5)
    _, text = refusal(lambda: linalg.contract("mk,kn->mn", A, B, {"row": "m", "col": "n"}, **options), grid)
    assert message in text


@pytest.mark.grids(SQUARE)
def test_an_out_that_does_not_fit_is_an_error_on_all_ranks(grid):
    _, A, B = operands(grid, "summa", 5, 5, 5)
    axes = {"row": "m", "col": "n"}
    kind, text = refusal(lambda: linalg.contract("mk,kn->mn", A, B, axes, A.astype("float32")), grid)
    assert kind is ShapeError
    assert "out must be float64(5, 5), as the result, and is float32(5, 5)" in text
