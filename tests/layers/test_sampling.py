"""Draws from cut logits equal NumPy's draws from whole rows, and follow the distribution that the options ask for."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import DistArray, Grid, Layout, comm, from_global, ledger, random
from colossal_mpi.layers.inference.sampling import CANDIDATES, Sampling, draw
from tests.cases import host

ROWS, TOKENS = 7, 301
_rng = np.random.default_rng(3)
LOGITS = {
    "steep": 3 * _rng.standard_normal((ROWS, 1, TOKENS)),
    "flat": 1e-3 * _rng.standard_normal((ROWS, 1, TOKENS)),
    "ties": _rng.integers(0, 3, (ROWS, 1, TOKENS)).astype(float),
    "equal": np.zeros((ROWS, 1, TOKENS)),
    "few": _rng.standard_normal((ROWS, 1, 5)),
}
POSITIONS = _rng.integers(0, 50, (ROWS, 1))
CASES = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cold": {"temperature": 1e-3},
    "hot": {"temperature": 50.0},
    "top-1": {"top_k": 1},
    "top-k": {"top_k": 4, "temperature": 0.5},
    "top-all": {"top_k": 1000},
    "top-p": {"top_p": 0.9, "seed": 5},
    "top-p-least": {"top_p": 1e-9},
    "both": {"top_k": 100, "top_p": 0.5},
    "fewer": {"vocabulary": 3},
    "fewer-k": {"vocabulary": 3, "top_k": 4},
}


def kept(logits, sampling):
    """Return the tokens of a row that may be drawn, the likeliest first, and their probabilities."""
    values = logits[: sampling.vocabulary]
    order = np.argsort(-values, kind="stable")[: 1 if sampling.temperature == 0 else sampling.top_k]
    weights = np.exp((values[order] - values[order[0]]) / (sampling.temperature or 1.0))
    shares = weights / weights.sum()
    n = int(np.sum(np.cumsum(shares) < sampling.top_p)) + 1 if sampling.top_p < 1 else len(order)
    return order[:n], shares[:n] / shares[:n].sum()


def expected(logits, sampling, positions):
    tokens = []
    for i, row in enumerate(logits[:, 0]):
        at = positions[i, 0]
        unit = random.uniform_block(((i, i + 1), (at, at + 1)), (ROWS, 100), sampling.seed, "generate")[0, 0]
        order, shares = kept(row, sampling)
        tokens.append(order[min(int(np.sum(np.cumsum(shares) <= unit)), len(order) - 1)])
    return np.array(tokens)[:, None]


@pytest.mark.grids({}, {"col": 3}, {"row": 2, "col": 2}, {"row": 8}, {"data": 2, "col": 4})
def test_draws_equal_those_of_whole_rows(grid):
    rows = [axis for axis in grid.axes if axis != "col"]
    layouts = [Layout(rows, None, "col" if "col" in grid.axes else None), Layout(None, rows, None)]
    for name, logits in LOGITS.items():
        for case, options in CASES.items():
            sampling = Sampling(**options)
            exact = expected(logits, sampling, POSITIONS)
            for layout in layouts:
                tokens = draw(from_global(logits, grid, layout), POSITIONS, sampling)
                assert tokens.layout == Layout(*layout.dims[:2]).on(grid.axes, 2)
                assert np.array_equal(tokens.gather(), exact), (name, case)


def test_draws_have_the_distribution_and_no_other_token():
    grid, n = Grid(MPI.COMM_SELF), 20_000
    row = np.log(np.array([0.05, 0.3, 0.02, 0.25, 0.18, 0.2]))
    for options in ({}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.74}, {"top_p": 0.76, "temperature": 0.9}):
        sampling = Sampling(**options, seed=11)
        logits = DistArray(np.broadcast_to(row, (n, 1, 6)).copy(), (n, 1, 6), Layout(None, None, None), grid)
        drawn = np.bincount(host(draw(logits, np.zeros((n, 1), int), sampling)).reshape(-1), minlength=6)
        order, shares = kept(row, sampling)
        assert set(np.flatnonzero(drawn)) == set(order)
        statistic = np.sum((drawn[order] - n * shares) ** 2 / (n * shares))
        assert statistic < 30  # chi-square of at most 5 degrees of freedom: p = 1.5e-5
    assert list(kept(row, Sampling(top_p=0.74))[0]) == [1, 3, 5]
    assert list(kept(row, Sampling(top_p=0.76))[0]) == [1, 3, 5, 4]


@pytest.mark.grids({"col": 3}, {"row": 2, "col": 2})
def test_words_of_a_draw(grid):
    p, layout = grid.axes["col"], Layout("row" if "row" in grid.axes else None, None, "col")

    def words(logits, **options):
        with ledger.record() as moved:
            draw(from_global(logits, grid, layout), POSITIONS, Sampling(**options))
        return sum(comm.collect(moved.words, grid))

    steep = 100 * LOGITS["steep"]
    candidates = p * (p - 1) * ROWS * 2  # each of p ranks receives the others' logits and tokens
    assert words(steep, temperature=0.0) == candidates
    assert words(steep, top_k=4) == 4 * candidates
    divisors = 2 * (p - 1) * ROWS
    assert words(steep) == words(steep, top_p=0.9) == CANDIDATES * candidates + divisors
    assert words(LOGITS["equal"], top_p=0.99) == 9 * CANDIDATES * candidates + divisors


@pytest.mark.grids({"col": 2})
def test_places_of_the_random_matrix(grid):
    rows, columns = np.array([[0, 5], [2, 2]]), np.array([[0, 3], [4, 2**33 + 1]])
    found = random.uniform_at(rows, columns, 7, "x")
    for (i, j), value in np.ndenumerate(found):
        r, c = rows[i, j], columns[i, j]
        assert value == random.uniform_block(((r, r + 1), (c, c + 1)), (9, 1), 7, "x")[0, 0]
