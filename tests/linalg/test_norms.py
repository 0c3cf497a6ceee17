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


EXTREMES = {
    "great": np.full((4, 3), 1e200),
    "small": np.full((4, 3), -1e-200),
    "denormal": np.full((4, 3), 5e-321),
    "near the greatest": np.full((4, 3), 4e307),
    "mixed": np.array([[1e200, 1.0, 0.0], [1e-200, 3.0, -2e200], [0.0, 1e180, 1.0]]),
    "mixed small": np.array([[1e-160, 0.0, 3e-170], [1e-300, -4e-163, 0.0]]),
    "float32": np.full((4, 3), 3e38, "float32"),
    "float16": np.full((400, 3), 6e4, "float16"),
    "complex64": np.full((4, 3), 3e38 + 3e38j, "complex64"),
    "complex128": np.full((4, 3), 1e200 - 1e200j),
    "small complex128": np.full((4, 3), 1e-200 - 3e-200j),
    "int8": np.full((9, 7), -128, "int8"),
    "int16": np.full((9, 7), -32768, "int16"),
    "int64": np.full((9, 7), np.iinfo("int64").min),
    "uint8": np.full((9, 7), 200, "uint8"),
    "bool": np.ones((9, 7), "bool"),
}


@pytest.mark.grids({}, {"row": 2, "col": 2})
@pytest.mark.parametrize("name", EXTREMES)
def test_norms_are_right_wherever_float64_holds_them(grid, name):
    whole = EXTREMES[name]
    axes = [*grid.axes, None, None][:2]
    a = from_global(whole, grid, Layout(*axes))
    size = abs(whole.astype("clongdouble" if whole.dtype.kind == "c" else "longdouble"))
    exact = {"fro": np.sqrt((size**2).sum()), "max": size.max(), 1: size.sum(0).max(), math.inf: size.sum(1).max()}
    for order, expected in exact.items():
        assert math.isclose(linalg.norm(a, order), float(expected), rel_tol=4e-15, abs_tol=5e-324), order


@pytest.mark.grids({"row": 2})
def test_only_a_norm_beyond_the_range_takes_a_second_word(grid):
    for value, words in ((1.0, 2), (1e130, 2), (1e-130, 2), (1e200, 4), (1e-200, 4), (0.0, 4), (math.nan, 2)):
        a = from_global(np.full((4, 3), value), grid, Layout("row", None))
        with ledger.record() as moved:
            a.norm()
        assert sum(comm.collect(moved.words, grid)) == words, value


@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "bool", "int64"])
def test_sums_of_integers_do_not_wrap(grid, dtype):
    whole = np.full((9, 7), {"int8": -128, "int16": 32767, "uint8": 200, "bool": 1, "int64": 2**40}[dtype]).astype(
        dtype
    )
    a, exact = from_global(whole, grid, Layout("row", "col")), whole.astype("int64")
    assert a.sum() == exact.sum()
    assert np.array_equal(a.sum_over([0]).gather(), whole.sum(0))
    assert a.sum_over([1]).dtype == whole.sum(1).dtype
    assert linalg.trace(a) == np.trace(exact)
    if dtype != "int64":
        assert linalg.dot(a, a) == np.vdot(exact, exact)
        for made, product in ((linalg.gram(a), exact.T @ exact), (linalg.syrk(a), exact @ exact.T)):
            assert np.array_equal(made.gather(), product)
            assert made.dtype == whole.sum(0).dtype


@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64"])
def test_products_of_integers_wrap_as_numpys_do(grid, dtype):
    whole = (np.arange(35) * 97 % 256).astype("int64") * (2**56 if dtype == "int64" else 1)
    whole = whole.astype(dtype).reshape(5, 7)
    a = from_global(whole, grid, Layout("row", "col"))
    product = a @ a.T
    assert product.dtype == a.dtype
    assert np.array_equal(product.gather(), whole @ whole.T)


@pytest.mark.grids({"row": 2})
def test_the_inner_product_of_16_bit_floats_is_formed_in_float32(grid):
    a = from_global(np.full((4, 3), 6e4, "float16"), grid, Layout("row", None))
    assert linalg.dot(a, a) == pytest.approx(12 * 6e4**2, rel=1e-6)
