"""Norms, products and parts of matrices equal NumPy's in every layout."""

import math

import numpy as np
import pytest

from colossal_mpi import Layout, OptionError, ShapeError, comm, from_global, ledger, linalg
from tests.cases import integers, layouts, some, spread

GRIDS = pytest.mark.grids({}, {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 1, "col": 3})
SHAPES = pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 9), (2, 0)], ids=str)
EXACT = pytest.mark.parametrize("dtype", ["float64", "complex128"])


def arrays(grid, shape, dtype, seed=0):
    """Yield a matrix of small integers in many layouts, partial sums included."""
    whole = integers(shape, dtype, seed)
    for layout in some(layouts(2, grid.axes), 25):
        yield whole, spread(whole, grid, layout)


@GRIDS
@SHAPES
@EXACT
def test_norms(grid, shape, dtype):
    for whole, a in arrays(grid, shape, dtype):
        size = abs(whole)
        exact = {"max": np.max(size, initial=0), 1: size.sum(0).max(initial=0), math.inf: size.sum(1).max(initial=0)}
        eps = 4 * np.finfo(float).eps * max(shape)  # of the sums of absolute values, which complex ones round
        for order, expected in exact.items():
            assert abs(linalg.norm(a, order) - expected) <= eps * expected, (order, a)
        assert abs(linalg.norm(a) - np.linalg.norm(whole)) <= eps * np.linalg.norm(whole)


@GRIDS
@SHAPES
@EXACT
def test_parts_and_sums_are_exact(grid, shape, dtype):
    for whole, a in arrays(grid, shape, dtype):
        assert np.array_equal(linalg.diagonal(a).gather(), np.diagonal(whole))
        assert linalg.trace(a) == np.trace(whole)
        for k in (-1, 0, 2):
            assert np.array_equal(linalg.tril(a, k).gather(), np.tril(whole, k))
            assert np.array_equal(linalg.triu(a, k).gather(), np.triu(whole, k))


@GRIDS
@EXACT
def test_inner_products_are_exact_between_layouts(grid, dtype):
    y = integers((7, 5), dtype, 3)
    for (whole, a), layout in zip(arrays(grid, (7, 5), dtype), reversed(layouts(2, grid.axes)), strict=False):
        assert linalg.dot(a, spread(y, grid, layout, seed=9)) == np.vdot(whole, y)


@GRIDS
@EXACT
def test_matvec_is_exact_and_leaves_the_matrix_where_it_is(grid, dtype):
    x = integers((5,), dtype, 3)
    for whole, a in arrays(grid, (7, 5), dtype):
        vector = from_global(x, grid, Layout(None))
        with ledger.record() as moved:
            y = linalg.matvec(a, vector)
        assert np.array_equal(y.gather(), whole @ x)
        assert y.layout.dims[0] == a.layout.dims[0]
        if not a.layout.partial:
            assert sum(comm.collect(moved.words, grid)) <= 2 * 7 * (grid.size - 1)


@pytest.mark.grids({"row": 2, "col": 3})
def test_nan_anywhere_makes_every_norm_nan(grid):
    whole = np.ones((7, 5))
    whole[6, 4] = np.nan
    a = from_global(whole, grid, Layout("row", "col"))
    assert all(math.isnan(linalg.norm(a, order)) for order in ("fro", "max", 1, math.inf))


@pytest.mark.grids({"row": 2})
def test_what_is_no_matrix_or_no_norm_is_refused(grid):
    vector = from_global(np.ones(4), grid, Layout("row"))
    with pytest.raises(OptionError, match="norm of order 2 of shape"):
        linalg.norm(vector, 2)
    for part in (linalg.diagonal, linalg.trace, linalg.tril, linalg.triu):
        with pytest.raises(ShapeError, match="it must be a matrix"):
            part(vector)


@pytest.mark.grids({"row": 2})
@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_norms_of_small_integers_do_not_overflow(grid, dtype):
    whole = np.full((9, 7), {"int8": -128, "uint8": 200, "bool": 1}[dtype]).astype(dtype)
    a = from_global(whole, grid, Layout("row", None))
    size = float(abs(whole[0, 0].astype(float)))
    assert [linalg.norm(a, order) for order in ("max", 1, np.inf)] == [size, 9 * size, 7 * size]
