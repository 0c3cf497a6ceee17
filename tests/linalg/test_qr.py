"""QR and least squares pass the acceptance tests of SLATE and LAPACK and move the documented words."""

import math

import array_api_strict
import numpy as np
import pytest

from colossal_mpi import (
    DistArray,
    DTypeError,
    Layout,
    OptionError,
    ShapeError,
    SingularError,
    comm,
    from_global,
    ledger,
    linalg,
)
from colossal_mpi.linalg.factor import triangular
from tests.cases import assemble, host, integers, layouts, refusal, some, totals

ONE, TWO, LINE, LONG, SLIM = {}, {"row": 2}, {"col": 3}, {"row": 5}, {"row": 1, "col": 4}
SQUARE, WIDE, CUBE = {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"a": 2, "b": 2, "c": 2}
ALL = (ONE, TWO, LINE, LONG, SLIM, SQUARE, WIDE, CUBE)
METHODS = ("auto", "cholesky", "tsqr")
DTYPES = ("float32", "float64", "complex64", "complex128")
SHAPES = [(40, 7), (9, 5), (7, 7), (5, 5), (3, 1), (6, 0)]


def normal(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def conditioned(m, n, condition, dtype="float64"):
    """Return a matrix whose singular values fall from 1 to 1 / condition."""
    u, v = (np.linalg.qr(normal(shape, dtype, seed))[0] for shape, seed in (((m, n), 1), ((n, n), 2)))
    return ((u * np.geomspace(1, 1 / condition, n)) @ v.conj().T).astype(dtype)


def assert_factors(a, factors):
    """Assert SLATE's bounds, ``||QR - A|| / (||A|| m)`` and ``||I - Q^H Q|| / m`` in norm 1, and the shape of R."""
    (q, r), (m, n) = map(assemble, factors), a.shape
    bound = 25 * np.finfo(a.dtype).eps * m
    assert (q.shape, r.shape, q.dtype, r.dtype) == ((m, n), (n, n), a.dtype, a.dtype)
    if n:
        assert np.linalg.norm(q @ r - a, 1) <= bound * np.linalg.norm(a, 1)
        assert np.linalg.norm(np.eye(n) - q.conj().T @ q, 1) <= bound
    assert np.array_equal(r, np.triu(r))
    assert np.all(np.diag(r).real >= 0)
    assert not np.any(np.diag(r).imag)


def same_on_all_ranks(r):
    return len({block.tobytes() for block in comm.collect(host(r), r.grid)}) == 1


@pytest.mark.grids(*ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_factors_of_any_layout(grid, method, dtype):
    for shape, layout in zip(SHAPES * 2, some(layouts(2, grid.axes), 2 * len(SHAPES)), strict=False):
        a = normal(shape, dtype)
        x = from_global(a, grid, layout)
        factors = linalg.qr(x, method)
        rows, columns = x.layout.dims
        assert_factors(a, factors)
        assert factors.q.layout == Layout((*rows, *columns), None)
        assert same_on_all_ranks(factors.r)


@pytest.mark.grids(ONE, LINE, LONG, SQUARE)
@pytest.mark.parametrize(
    ("method", "condition"),
    [
        (method, 10.0**digits)
        for method in METHODS
        for digits in (2, 7, 9, 12, 15)
        if (method, digits) != ("cholesky", 15)
    ],
)
def test_ill_conditioned_matrices(grid, method, condition):
    """Beyond a condition of 1e12 one shifted pass may not suffice for CholeskyQR, and auto takes tsqr."""
    a = conditioned(100, 11, condition)
    assert_factors(a, linalg.qr(from_global(a, grid, Layout(tuple(grid.axes), None)), method))


@pytest.mark.grids(LINE, LONG)
@pytest.mark.parametrize("method", ["auto", "tsqr"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_deficient_matrices(grid, method, dtype):
    full = integers((20, 6), dtype)
    twice, none, zero = full.copy(), full.copy(), np.zeros_like(full)
    twice[:, 4], none[:, 2] = twice[:, 1], 0
    for a in (twice, none, zero):
        x = from_global(a, grid, Layout(tuple(grid.axes), None))
        assert_factors(a, linalg.qr(x, method))
    kind, text = refusal(lambda: linalg.qr(from_global(none, grid, Layout(None, None)), "cholesky"), grid)
    assert kind is SingularError
    assert "the columns are dependent to rounding" in text
    assert "use method='tsqr' or 'auto'" in text


@pytest.mark.grids(LINE, SQUARE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("scale", [2.0**-664, 2.0**664, (2.0**500, 2.0**-600, 1.0, 2.0**10)], ids=str)
def test_squares_that_overflow_or_vanish(grid, scale, dtype, method):
    a = normal((20, 4), dtype)
    q, r = linalg.qr(from_global(a * scale, grid, Layout(tuple(grid.axes), None)), method)
    assert np.linalg.norm(assemble(q) @ (assemble(r) / scale) - a) <= 25 * 20 * np.finfo(float).eps * 9
    assert np.linalg.norm(np.eye(4) - assemble(q).conj().T @ assemble(q)) <= 25 * 20 * np.finfo(float).eps


@pytest.mark.grids(LINE, LONG, SQUARE)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_r_is_unique_so_that_methods_and_grids_agree(grid, dtype):
    a = normal((30, 6), dtype)
    x = from_global(a, grid, Layout(tuple(grid.axes), None))
    q, r = np.linalg.qr(a)
    phase = np.diag(r) / abs(np.diag(r))
    q, r = q * phase, r / phase[:, None]
    bound = 30 * np.finfo(float).eps * np.linalg.norm(a) * np.linalg.cond(a)
    for method in METHODS:
        made = linalg.qr(x, method)
        assert np.linalg.norm(assemble(made.r) - r) <= bound, method
        assert np.linalg.norm(assemble(made.q) - q) <= bound, method


def words(grid, call):
    with ledger.record() as moved:
        result = call()
    return result, totals([moved.words], grid)[0]


@pytest.mark.grids(TWO, LINE, LONG, SLIM, SQUARE)
def test_words_of_cholesky_passes(grid):
    p, n = grid.size, 6
    x = from_global(conditioned(40, n, 100), grid, Layout(tuple(grid.axes), None))
    (q, _), two = words(grid, lambda: linalg.qr(x, "cholesky"))
    _, one = words(grid, lambda: linalg.qr(q, "auto"))
    assert (one, two) == ((p - 1) * n * (n + 1), 2 * (p - 1) * n * (n + 1))


@pytest.mark.grids(TWO, LINE, LONG, SLIM, SQUARE, {"row": 7})
@pytest.mark.parametrize("shape", [(60, 6), (11, 6), (6, 6), (9, 2)], ids=str)
def test_words_of_the_tree(grid, shape):
    n = shape[1]
    x = from_global(normal(shape, "float64"), grid, Layout(tuple(grid.axes), None))
    moved = words(grid, lambda: linalg.qr(x, "tsqr"))[1]
    rows = comm.collect(x.local.shape[0], grid)
    heights, step, expected = [min(h, n) for h in rows], 1, 0
    while step < grid.size:
        for r in range(0, grid.size - step, 2 * step):
            h = heights[r + step]
            expected += h * n - h * (h - 1) // 2 + h * n
            heights[r] = min(n, heights[r] + h)
        step *= 2
    assert moved == expected + (grid.size - 1) * n * (n + 1) // 2
    if min(rows) >= n:
        assert moved == (grid.size - 1) * (2 * n * n + n)


@pytest.mark.grids(SLIM, SQUARE, WIDE)
def test_columns_that_are_cut_move_to_rows_first(grid):
    m, n, cut = 24, 6, list(grid.axes)[1]
    a = from_global(conditioned(m, n, 10), grid, Layout(next(iter(grid.axes)), cut))
    _, moved = words(grid, lambda: linalg.qr(a, "cholesky"))
    c, p = grid.axes[cut], grid.size
    assert moved == m * n * (c - 1) // c + 2 * (p - 1) * n * (n + 1)


@pytest.mark.grids(SQUARE, LINE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_blocks_need_not_be_numpy(grid, method, dtype):
    for a in (normal((9, 5), dtype), conditioned(50, 5, 1e5, dtype) if dtype == "float32" else normal((7, 7), dtype)):
        x = from_global(a, grid, Layout(tuple(grid.axes), None))
        x = DistArray(array_api_strict.asarray(host(x)), x.shape, x.layout, grid)
        factors = linalg.qr(x, method)
        assert {type(y.local) for y in factors} == {type(x.local)}
        assert_factors(a, [y.like(host(y)) for y in factors])
        solution = linalg.lstsq(x, x[:, :2], method=method)
        assert type(solution.local) is type(x.local)


@pytest.mark.grids(SQUARE)
def test_what_cannot_be_factored_is_the_same_error_on_all_ranks(grid):
    def zeros(shape, dtype="float64"):
        return from_global(np.zeros(shape, dtype), grid, Layout("row", *[None] * (len(shape) - 1)))

    for call, kind, message in [
        (lambda: linalg.qr(zeros((3, 5))), ShapeError, "no more columns than rows; factor its .H"),
        (lambda: linalg.qr(zeros((5,))), ShapeError, "qr of shape (5,): it must be a matrix"),
        (lambda: linalg.qr(zeros((5, 3), "int64")), DTypeError, "qr of int64: use float32, float64"),
        (lambda: linalg.qr(zeros((5, 3)), "house"), OptionError, "no method 'house'; there are auto, cholesky, tsqr"),
        (lambda: linalg.qr(np.zeros((5, 3))), DTypeError, "qr of ndarray: make a DistArray of it"),
        (lambda: linalg.lstsq(zeros((5, 3)), zeros((4,))), ShapeError, "lstsq of shapes (5, 3) and (4,)"),
        (lambda: linalg.lstsq(zeros((5, 3)), zeros((5,), "float32")), DTypeError, "a is float64 and b is float32"),
        (lambda: linalg.lstsq(zeros((5, 3)), zeros((5,))), SingularError, "must have full rank"),
    ]:
        raised, text = refusal(call, grid)
        assert raised is kind
        assert message in text


@pytest.mark.grids(ONE, LINE, LONG, SQUARE, WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 7), (9, 5), (6, 6)], ids=str)
def test_the_residual_of_least_squares_is_orthogonal(grid, shape, dtype):
    """LAPACK's gels test: ``||(A x - b)^H A|| / (||A|| ||b|| max(m, n, r) eps)`` below 30."""
    a, lays = normal(shape, dtype, 1), (some(layouts(2, grid.axes), 3) * 3)[:3]
    for right, layout in [((), lays[0]), ((1,), lays[1]), ((3,), lays[2])]:
        b = normal((shape[0], *right), dtype, 2)
        given = from_global(b, grid, Layout(tuple(grid.axes), *[None] * len(right)))
        x = linalg.lstsq(from_global(a, grid, layout), given)
        residual = a @ assemble(x) - b
        scale = np.linalg.norm(a) * np.linalg.norm(b) * max(shape) * np.finfo(dtype).eps
        assert x.layout == Layout(*[None] * b.ndim)
        assert x.shape == (shape[1], *right)
        assert np.linalg.norm(residual.conj().T @ a) <= 30 * scale, layout


@pytest.mark.grids(LINE, SQUARE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_matrices_have_the_shortest_solution(grid, dtype):
    a, b = normal((5, 12), dtype, 1), normal((5, 3), dtype, 2)
    out = Layout(None, list(grid.axes)[-1])
    for layout in some(layouts(2, grid.axes), 6):
        x = linalg.lstsq(from_global(a, grid, layout), from_global(b, grid, Layout(list(grid.axes)[-1], None)), out)
        expected = np.linalg.lstsq(a.astype("complex128"), b.astype("complex128"), rcond=None)[0]
        bound = 30 * 12 * np.finfo(dtype).eps * np.linalg.cond(a) * np.linalg.norm(expected)
        assert np.linalg.norm(assemble(x) - expected) <= bound, layout
        assert x.layout == out


@pytest.mark.grids(LINE, SQUARE)
def test_least_squares_of_an_ill_conditioned_matrix(grid):
    a, x = conditioned(60, 8, 1e10), normal((8,), "float64")
    b = a @ x
    made = linalg.lstsq(from_global(a, grid, Layout(tuple(grid.axes), None)), from_global(b, grid, Layout(None)))
    assert np.linalg.norm(a @ assemble(made) - b) <= 30 * 60 * np.finfo(float).eps * np.linalg.norm(b)
    assert math.isclose(made.norm(), np.linalg.norm(x), rel_tol=60 * np.finfo(float).eps * 1e10)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triangular_solutions_have_small_residuals(n, dtype):
    """The triangle has the condition 1 / sqrt(eps), the greatest that a Cholesky factor has."""
    eps = np.finfo(dtype).eps
    r = np.linalg.qr(conditioned(max(n, 1), max(n, 1), eps**-0.5, dtype)[:n, :n])[1] if n else np.zeros((0, 0), dtype)
    a = normal((90, n), dtype)
    x = triangular.solve_upper(a, r)
    assert np.linalg.norm(x @ r - a) <= 4 * max(n, 1) * eps * np.linalg.norm(x) * np.linalg.norm(r)


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize("method", METHODS)
def test_more_columns_than_are_solved_at_once(grid, method):
    a = conditioned(400, 150, 1e10)
    assert_factors(a, linalg.qr(from_global(a, grid, Layout(("row", "col"), None)), method))
