"""Predicted words are the ledger's; the bounds are attained where theory says so."""

import itertools

import pytest

from colossal_mpi import ShapeError, comm, ledger, linalg, random
from colossal_mpi.linalg.model import price
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
        predicted = price.price("mk,kn->mn", EXTENTS, grid.axes, axes, lay_a, lay_b, out)
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
    free = linalg.best_grid(512, 512, 512, 64, balance=0)
    tight = linalg.best_grid(512, 512, 512, 64, memory=free.memory - 1, balance=0)
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
