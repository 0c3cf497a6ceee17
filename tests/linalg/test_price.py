"""Predicted words equal the ledger's, and the bounds are attained where theory says so."""

import itertools
import math
from dataclasses import replace

import pytest

from colossal_mpi import Layout, ShapeError, comm, ledger, linalg, random
from colossal_mpi.machine import TYPICAL, Link
from tests.cases import layouts, some

GRIDS = pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 1, "col": 3}, {"x": 2, "y": 2, "z": 2})
EXTENTS = {"m": 7, "n": 5, "k": 9}


def maps(grid):
    """Return every map of the grid's axes to letters, some axes left out."""
    for letters in itertools.product(["m", "n", "k", None], repeat=len(grid.axes)):
        yield {axis: letter for axis, letter in zip(grid.axes, letters, strict=True) if letter}


@GRIDS
def test_predicted_words_are_those_of_the_ledger(grid):
    stored = some(layouts(2, grid.axes), 40)
    for axes in some(maps(grid), 20):
        lay_a, lay_b, out = some(stored, 3, seed=str(axes))
        a, b = (random.normal(s, grid, lay.with_partial()) for s, lay in (((7, 9), lay_a), ((9, 5), lay_b)))
        a, b = a.redistribute(lay_a), b.redistribute(lay_b)
        with ledger.record() as moved:
            linalg.contract("mk,kn->mn", a, b, axes, out)
        predicted = linalg.price("mk,kn->mn", EXTENTS, grid.axes, axes, lay_a, lay_b, out)
        assert list(predicted.words) == comm.collect(moved.words, grid), (axes, lay_a, lay_b, out)


@pytest.mark.parametrize(
    ("m", "n", "k", "ranks"),
    [(64, 64, 64, 8), (90, 90, 90, 27), (512, 512, 512, 64), (4096, 16, 16, 4), (16, 16, 4096, 8), (999, 999, 54, 9)],
)
def test_the_best_grid_attains_the_bound_where_it_divides(m, n, k, ranks):
    best = linalg.best_grid(m, n, k, ranks)
    assert best.bound <= best.words * (1 + 1e-12)
    assert best.words <= best.bound * (1.01 if m != n or n != k else 1 + 1e-12)


def test_a_prime_number_of_ranks_is_not_cut_in_one_dimension():
    best = linalg.best_grid(20_000, 20_000, 20_000, 127)
    line = 2 * 20_000**2 * (1 - 1 / 127) / 1
    assert best.ranks <= 127
    assert line / best.words > 10
    assert best.flop < 1.05 * 2 * 20_000**3 / 127


def test_ties_go_against_cutting_k():
    assert dict(linalg.best_grid(256, 256, 256, 2).sizes)["depth"] == 1
    assert dict(linalg.best_grid(256, 256, 256, 4).sizes) in ({"row": 2, "col": 2, "depth": 1},)


def test_memory_is_kept_and_what_cannot_fit_is_refused():
    machine = replace(TYPICAL, far=Link(0.0, math.inf))  # words cost nothing
    free = linalg.best_grid(512, 512, 512, 64, machine=machine)
    tight = linalg.best_grid(512, 512, 512, 64, memory=free.memory - 1, machine=machine)
    assert tight.memory < free.memory
    with pytest.raises(ShapeError, match=r"needs at least [\d,]+ elements on a rank .* and memory is 100"):
        linalg.best_grid(512, 512, 512, 64, memory=100)


def test_the_bound_is_continuous_between_its_regimes():
    m, n, k = 4096, 512, 64
    for border in (m / n, m * n / k**2):
        below, above = (linalg.lower_bound(m, n, k, border * (1 + s)) for s in (-1e-9, 1e-9))
        assert below == pytest.approx(above, rel=1e-6)


def test_memory_bound_falls_with_memory():
    assert linalg.memory_bound(512, 512, 512, 8, 1000) > linalg.memory_bound(512, 512, 512, 8, 4000) > 0


def test_words_between_nodes_take_longer_than_words_within_one():
    """Two nodes of four ranks: A moves over col, within a node, and B over row, between the nodes."""
    layout, sizes = Layout("row", "col"), {"row": 2, "col": 4}
    priced = linalg.price("mk,kn->mn", EXTENTS, sizes, {"row": "m", "col": "n"}, layout, layout, layout)
    of_a, of_b, _ = priced.traffic
    assert (of_a.axes, of_b.axes) == (("col",), ("row",))
    machine = replace(TYPICAL, near=Link(1.0, 8.0), far=Link(10.0, 2.0), ranks_per_node=4, flops=math.inf)
    near, far = max(of_a.words) * 8 / 8 + of_a.messages * 1, max(of_b.words) * 8 / 2 + of_b.messages * 10
    assert priced.seconds(machine, 8) == pytest.approx(near + far)
    one_node = replace(machine, ranks_per_node=8)
    busiest = max(priced.words)
    assert priced.seconds(one_node, 8) == pytest.approx(busiest * 8 / 8 + priced.messages * 1)
