"""Products pass the acceptance tests of SLATE and of the PBLAS, and move the words that were predicted.

They run every map on every grid at one ragged size, and all pairs of dtypes, transposes, factors, sizes and executions.
"""

import itertools
import math
import random

import numpy as np
import pytest

from colossal_mpi import Layout, comm, from_global, ledger, linalg
from colossal_mpi.linalg.contraction.subscripts import parse
from colossal_mpi.linalg.model.auto import maps
from colossal_mpi.linalg.verify import Check
from tests.cases import host, integers, layouts
from tests.linalg.execution import EXECUTIONS, execute_as

GRIDS = pytest.mark.grids(
    {"row": 1, "col": 1}, {"row": 1, "col": 3}, {"row": 3, "col": 1}, {"row": 2, "col": 2}, {"row": 2, "col": 3},
    {"row": 2, "col": 2, "depth": 2}, {"row": 1, "col": 2, "depth": 4},
)  # fmt: skip
RAGGED = (33, 7, 13)
FACTORS = {
    "dtype": ["float32", "float64", "complex64", "complex128"],
    "a": ["mk", "km", "conj-mk", "conj-km"],
    "b": ["kn", "nk", "conj-kn", "conj-nk"],
    "c": ["mn", "nm"],
    "factors": [(1, 0), (1, 1), (-0.5, 0), (3.1, 2.7), (3.1 + 1.4j, 2.7 - 1.7j), (0, 1), (2, "nan")],
    "sizes": [
        (1, 1, 1), (7, 7, 7), (33, 33, 33), (130, 33, 7), (7, 130, 33), (33, 7, 130), (257, 130, 33), (130, 257, 257),
        (0, 7, 33), (7, 0, 7), (33, 7, 0), (1, 257, 7),
    ],
    "execution": EXECUTIONS,
}  # fmt: skip


def all_pairs(factors, seed=0):
    """Return cases that together have every pair of values of any two factors: greedy, from random candidates."""
    names, draw = list(factors), random.Random(seed)
    pairs = itertools.combinations(range(len(names)), 2)
    missing = {
        (i, x, j, y) for i, j in pairs for x in range(len(factors[names[i]])) for y in range(len(factors[names[j]]))
    }
    while missing:
        i, x, j, y = min(missing)
        tries = []
        for _ in range(30):
            case = [draw.randrange(len(factors[name])) for name in names]
            case[i], case[j] = x, y
            met = {(p, case[p], q, case[q]) for p, q in itertools.combinations(range(len(names)), 2)}
            tries.append((len(met & missing), case, met))
        _, case, met = max(tries, key=lambda one: one[0])
        missing -= met
        yield {name: factors[name][at] for name, at in zip(names, case, strict=True)}


CASES = list(all_pairs(FACTORS))


def normal(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def accepted(c, a, b, c0, subscripts, alpha, beta, conj):
    """Return whether `c`, a NumPy array, passes both forward tests against a reference with more digits."""
    wide = np.clongdouble if c.dtype.kind == "c" else np.longdouble
    left, right, before = (x.astype(wide) for x in (a, b, c0))
    left, right = (np.conj(x) if name in conj else x for x, name in ((left, "a"), (right, "b")))
    exact = alpha * np.einsum(subscripts, left, right) + beta * before
    k, eps = a.shape["km".index("k") if subscripts.startswith("km") else 1], np.finfo(c.dtype).eps
    factor = 2 * math.sqrt(2) if c.dtype.kind == "c" else 1
    norms = math.sqrt(k + 2) * abs(alpha) * np.linalg.norm(a) * np.linalg.norm(b)
    bound = 3 * eps * (norms + 2 * abs(beta) * np.linalg.norm(c0)) * factor
    gauge = 16 * eps * (abs(alpha) * np.einsum(subscripts, abs(a), abs(b)) + abs(beta) * abs(c0)) * factor
    difference = abs(c - exact)
    return bool(np.linalg.norm(difference) <= bound and np.all(difference <= gauge))


def on_root(grid, verdict):
    """Return rank 0's verdict on all ranks."""
    return comm.share(verdict() if grid.rank == 0 else None, grid)


def words_as_predicted(moved, grid, subscripts, a, b, axes, out, **panels):
    sub = parse(subscripts)
    extents = dict(zip(sub.a, a.shape, strict=True)) | dict(zip(sub.b, b.shape, strict=True))
    predicted = linalg.price(subscripts, extents, grid.axes, axes, a.layout, b.layout, out, **panels)
    return comm.collect(moved.words, grid) == list(predicted.words)


@GRIDS
@pytest.mark.parametrize("execution", ["whole", "read", "message", "k-message"])
def test_every_map_on_every_grid(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    m, k, n = RAGGED
    a, b, c0 = normal((m, k), "float64", 1), normal((k, n), "float64", 2), normal((m, n), "float64", 3)
    stored, wrong = layouts(2, list(grid.axes), partial=False), []
    for i, axes in enumerate(maps(parse("mk,kn->mn"), grid)):
        A, B, C = (from_global(x, grid, stored[(5 * i + j) % len(stored)]) for j, x in enumerate((a, b, c0)))
        check = Check("mk,kn->mn", A, B, -0.5, 2.5, C)
        with ledger.record() as moved:
            linalg.contract("mk,kn->mn", A, B, axes, C, alpha=-0.5, beta=2.5, **panels)
        if not words_as_predicted(moved, grid, "mk,kn->mn", A, B, axes, C.layout, **panels):
            wrong.append(("words", axes))
        check.passes(C)
        whole = C.gather(0)
        if not on_root(grid, lambda w=whole: accepted(w, a, b, c0, "mk,kn->mn", -0.5, 2.5, "")):
            wrong.append(("result", axes))
    assert not wrong


@pytest.mark.grids({"row": 2, "col": 3}, {"row": 2, "col": 2, "depth": 2})
@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: "-".join(str(x) for x in CASES[i].values()))
def test_all_pairs_of_dtype_transpose_factors_size_and_execution(grid, i, monkeypatch):
    case = CASES[i]
    panels = execute_as(case["execution"], grid, monkeypatch)
    (m, k, n), dtype = case["sizes"], case["dtype"]
    extents, of_a, of_b = {"m": m, "k": k, "n": n}, case["a"][-2:], case["b"][-2:]
    subscripts = f"{of_a},{of_b}->{case['c']}"
    conj = ("a" if "conj" in case["a"] else "") + ("b" if "conj" in case["b"] else "")
    alpha, beta = (x if isinstance(x, str) or np.dtype(dtype).kind == "c" else np.real(x) for x in case["factors"])
    letters = (of_a, of_b, case["c"])
    a, b, c0 = (normal([extents[x] for x in one], dtype, seed) for seed, one in enumerate(letters))
    stored, order = layouts(2, list(grid.axes), partial=False), list(maps(parse("mk,kn->mn"), grid))
    axes = order[7 * i % len(order)]
    A, B, C = (from_global(x, grid, stored[(11 * i + j) % len(stored)]) for j, x in enumerate((a, b, c0)))
    if beta == "nan":
        beta, c0 = 0, np.zeros_like(c0)
        C.local[...] = math.nan
    with ledger.record() as moved:
        linalg.contract(subscripts, A, B, axes, C, alpha=alpha, beta=beta, conj=conj, **panels)
    assert words_as_predicted(moved, grid, subscripts, A, B, axes, C.layout, **panels)
    whole = C.gather(0)
    assert on_root(grid, lambda: accepted(whole, a, b, c0, subscripts, alpha, beta, conj))


@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2}, {"row": 1, "col": 3}, {"row": 2, "col": 2, "depth": 2})
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_small_integers_are_exact_bit_for_bit(grid, execution, monkeypatch):
    panels = execute_as(execution, grid, monkeypatch)
    stored = layouts(2, list(grid.axes), partial=False)
    for i, axes in enumerate(maps(parse("mk,kn->mn"), grid)):
        dtype = ("float32", "complex128", "int64")[(i + EXECUTIONS.index(execution)) % 3]
        a, b, c0 = integers((33, 7), dtype, 1), integers((7, 13), dtype, 2), integers((33, 13), dtype, 3)
        A, B, C = (from_global(x, grid, stored[(3 * i + j) % len(stored)]) for j, x in enumerate((a, b, c0)))
        linalg.contract("mk,kn->mn", A, B, axes, C, alpha=2, beta=-1, **panels)
        assert np.array_equal(C.gather(), 2 * (a @ b) - c0), axes


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2})
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "subscripts", ["bsk,kn->bsn", "bik,bkj->bij", "ibk,kjb->jbi", "bsh,htad->bstad", "bsn,bsk->kn"]
)
def test_other_products_in_every_execution(grid, execution, subscripts, monkeypatch):
    letter = {"k": "k", "m": "s", "n": "n"}.get(execution[0])
    sizes = dict(zip("bskniijhtad", (3, 7, 5, 9, 6, 6, 4, 8, 3, 5, 2), strict=True))
    sub = parse(subscripts)
    panels = execute_as(execution, grid, monkeypatch)
    if panels:
        panels["stream"] = letter if letter in sub.a + sub.b else sub.a[0]
    a, b = integers([sizes[x] for x in sub.a], seed=1), integers([sizes[x] for x in sub.b], seed=2)
    options = list(maps(sub, grid))
    for axes in random.Random(1).sample(options, min(12, len(options))):
        A, B = (from_global(x, grid, Layout(tuple(grid.axes), *[None] * (x.ndim - 1))) for x in (a, b))
        c = linalg.contract(subscripts, A, B, axes, Layout(*[None] * len(sub.c)), **panels)
        assert np.array_equal(host(c.local), np.einsum(subscripts, a, b)), axes
