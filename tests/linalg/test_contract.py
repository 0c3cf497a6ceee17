"""Products on every map equal NumPy's, move the words of the formula, and have their adjoints on the same map."""

import itertools
import math

import array_api_strict
import numpy as np
import pytest

from colossal_mpi import (
    DistArray,
    DTypeError,
    Grid,
    GridError,
    Layout,
    LayoutError,
    ShapeError,
    from_global,
    ledger,
    zeros,
)
from colossal_mpi.linalg import adjoints, contract
from colossal_mpi.platform import backend
from tests.cases import assemble, astray, host, inner, integers, layouts, refusal, represents, some, spread, totals

SQUARE, WIDE, SLIM, CUBE = {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 1, "col": 4}, {"a": 2, "b": 2, "c": 2}
GEMM = "mk,kn->mn"
SUBSCRIPTS = [
    GEMM, "km,kn->mn", "mk,nk->mn", "mk,kn->nm", "km,nk->nm", "bsk,kn->bsn", "bik,bkj->bij", "ibk,kjb->jbi",
    "bsh,htad->bstad", "bsad,adh->bsh", "bsn,bsk->kn", "m,n->mn", "k,k->", "b,bn->bn", "b,b->b",
]  # fmt: skip
SIZES = dict(zip("mknbsijhtad", (7, 5, 9, 3, 4, 5, 2, 6, 3, 5, 2), strict=True))

ALL = 226  # maps of three axes to m, k, n or none of them, in every order

on_grids = pytest.mark.grids(SQUARE, WIDE, SLIM, CUBE)


def shapes(subscripts):
    """Return the shapes of the two operands and the result."""
    operands, c = subscripts.split("->")
    return [tuple(SIZES[x] for x in letters) for letters in (*operands.split(","), c)]


def maps(grid, letters):
    """Return every map of some of the grid's axes to letters, in every order of the axes."""
    found = []
    for chosen in itertools.product([None, *letters], repeat=len(grid.axes)):
        places = [(axis, x) for axis, x in zip(grid.axes, chosen, strict=True) if x]
        found += [dict(order) for order in itertools.permutations(places)]
    return found


def draw(grid, ndim, number, partial=True):
    """Return `number` random layouts, the same on every rank."""
    known = layouts(ndim, list(grid.axes), partial)
    return [known[i] for i in np.random.default_rng(ndim).integers(0, len(known), number)]


def cases(grid, subscripts, most):
    """Return maps, each with layouts of a, b and c."""
    chosen = some(maps(grid, dict.fromkeys(x for x in subscripts if x.isalpha())), most)
    stored = [draw(grid, len(shape), len(chosen), i < 2) for i, shape in enumerate(shapes(subscripts))]
    return list(zip(chosen, *stored, strict=True))


@on_grids
@pytest.mark.parametrize("subscripts", SUBSCRIPTS)
def test_every_map_gives_the_product_of_numpy_exactly(grid, subscripts):
    one, other, _ = shapes(subscripts)
    a, b = integers(one, seed=1), integers(other, seed=2)
    made = {}
    for axes, in_a, in_b, out in cases(grid, subscripts, ALL if subscripts == GEMM else 8):
        x, y = spread(a, grid, in_a), spread(b, grid, in_b, seed=9)
        made[f"{axes} of {in_a} and {in_b}"] = contract(subscripts, x, y, axes)
        made[f"{axes} of {in_a} and {in_b} in {out}"] = contract(subscripts, x, y, axes, out)
    assert not astray(made, np.einsum(subscripts, a, b))


@pytest.mark.grids(SQUARE, CUBE)
def test_the_result_lies_as_the_map_or_out_says(grid):
    a, b = (from_global(integers(shape), grid, Layout(None, None)) for shape in shapes(GEMM)[:2])
    for axes in some(maps(grid, "mkn"), 60):
        cut = {x: tuple(axis for axis, letter in axes.items() if letter == x) for x in "mkn"}
        left_by_map = Layout(cut["m"], cut["n"], partial=cut["k"])
        assert contract(GEMM, a, b, axes).layout == left_by_map
        for out in (Layout(None, None), Layout(None, tuple(grid.axes)), Layout(None, None, partial=tuple(grid.axes))):
            assert contract(GEMM, a, b, axes, out).layout == out


def test_one_rank_needs_no_map():
    grid = Grid()
    a, b, _ = (integers(shape) for shape in shapes("bsk,kn->bsn"))
    product = contract(
        "bsk, kn -> bsn", from_global(a, grid, Layout(None, None, None)), from_global(b, grid, Layout(None, None)), {}
    )
    assert represents(product, np.einsum("bsk,kn->bsn", a, b))


@pytest.mark.grids(WIDE)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 0, 5), (0, 5, 9), (1, 2, 9), (3, 1, 1)], ids=str)
def test_empty_blocks_and_empty_sums(grid, sizes):
    m, k, n = sizes
    a, b = integers((m, k), seed=1), integers((k, n), seed=2)
    for axes, in_a, in_b, out in cases(grid, GEMM, 30):
        product = contract(GEMM, spread(a, grid, in_a), spread(b, grid, in_b), axes, out)
        assert represents(product, a @ b), axes


def normal(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


@pytest.mark.grids(WIDE, CUBE)
@pytest.mark.parametrize("k", [1, 5, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_the_error_is_within_its_bound(grid, dtype, k):
    a, b = normal((7, k), dtype, 1), normal((k, 9), dtype, 2)
    wide = np.clongdouble if a.dtype.kind == "c" else np.longdouble
    exact = np.einsum(GEMM, a.astype(wide), b.astype(wide))
    bound = 3 * np.finfo(dtype).eps * math.sqrt(k + 2) * np.linalg.norm(a) * np.linalg.norm(b)
    bound *= 2 * math.sqrt(2) if a.dtype.kind == "c" else 1
    for axes, in_a, in_b, out in cases(grid, GEMM, 8):
        x, y = from_global(a, grid, in_a), from_global(b, grid, in_b)
        product = contract(GEMM, x, y, axes, out)
        assert product.dtype == a.dtype
        assert np.linalg.norm((assemble(product) - exact).astype(a.dtype)) <= bound, axes


@pytest.mark.smoke
@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128", "int64"])
def test_small_integers_are_exact_in_every_dtype(grid, dtype):
    a, b = integers((7, 5), dtype, 1), integers((5, 9), dtype, 2)
    for axes, in_a, in_b, out in cases(grid, GEMM, 12):
        product = contract(GEMM, spread(a, grid, in_a), spread(b, grid, in_b), axes, out)
        assert product.dtype == a.dtype
        assert represents(product, a @ b), axes


@pytest.mark.parametrize(
    ("subscripts", "both"),
    [(GEMM, ("mn,kn->mk", "mk,mn->kn")), ("bsh,htad->bstad", ("bstad,htad->bsh", "bsh,bstad->htad"))],
)
def test_adjoints_are_products_of_the_same_box(subscripts, both):
    assert adjoints(subscripts) == both


def conj(x):
    return x.like(backend.namespace(x.local).conj(x.local))


@on_grids
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("subscripts", [GEMM, "bik,bkj->bij", "bsh,htad->bstad", "bsad,adh->bsh", "ibk,kjb->jbi"])
def test_both_adjoints_on_the_same_map(grid, subscripts, dtype):
    """<contract(a, b), dc> == <a, da> == <b, db>, complex conjugates taken, by inner products of global arrays."""
    first, second = adjoints(subscripts)
    one, other, result = shapes(subscripts)
    products, of_a, of_b = [], [], []
    for axes, in_a, in_b, out in cases(grid, subscripts, 10):
        a, b = spread(integers(one, dtype, 1), grid, in_a), spread(integers(other, dtype, 2), grid, in_b)
        c = contract(subscripts, a, b, axes)
        dc = from_global(integers(result, dtype, 3), grid, out)
        da = contract(first, dc, conj(b), axes, a.layout.with_partial())
        db = contract(second, conj(a), dc, axes, b.layout.with_partial())
        products.append(inner(c, dc.redistribute(c.layout.with_partial())))
        of_a.append(inner(a, da))
        of_b.append(inner(b, db))
    assert totals(products, grid) == totals(of_a, grid) == totals(of_b, grid)


def stored(letters, axes, whole):
    """Return the layout of an array that is stored once: as the map cuts it, and innermost over the axes `whole`."""
    dims = [[axis for axis, letter in axes.items() if letter == x] for x in letters]
    for i, axis in enumerate(whole):
        dims[i % len(dims)].append(axis)
    return Layout(*dims)


@pytest.mark.grids(SQUARE, WIDE, CUBE)
def test_words_of_every_map_are_those_of_the_formula(grid):
    m, k, n = 7, 5, 9
    wrong = []
    for axes in maps(grid, "mkn"):
        on = {x: [axis for axis, letter in axes.items() if letter == x] for x in "mkn"}
        a = from_global(integers((m, k)), grid, stored("mk", axes, on["n"]))
        b = from_global(integers((k, n)), grid, stored("kn", axes, on["m"]))
        with ledger.record() as moved:
            contract(GEMM, a, b, axes, stored("mn", axes, on["k"]))
        p_m, p_k, p_n = (grid.extent(on[x]) for x in "mkn")
        volume = m * k * (p_n - 1) + k * n * (p_m - 1) + m * n * (p_k - 1)
        wrong.append(moved.words - volume / (p_m * p_k * p_n))
    assert totals(wrong, grid) == pytest.approx([0] * len(wrong), abs=1e-9)


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize("subscripts", SUBSCRIPTS)
def test_blocks_need_not_be_numpy(grid, subscripts):
    one, other, _ = shapes(subscripts)
    a, b = integers(one, seed=1), integers(other, seed=2)
    made = {}
    for axes, in_a, in_b, out in cases(grid, subscripts, 12):
        x, y = spread(a, grid, in_a), spread(b, grid, in_b)
        x, y = (DistArray(array_api_strict.asarray(host(z).copy()), z.shape, z.layout, grid) for z in (x, y))
        made[f"{axes} of {in_a} and {in_b}"] = contract(subscripts, x, y, axes, out)
    assert {type(array.local) for array in made.values()} == {type(array_api_strict.asarray(0))}
    assert not astray(made, np.einsum(subscripts, a, b))


WRONG = {
    "one-operand": ("mk->mk", {}, ShapeError, "write two operands and a result, as 'mk,kn->mn'"),
    "three-operands": ("mk,kn,nj->mj", {}, ShapeError, "write two operands and a result"),
    "no-arrow": ("mk,kn", {}, ShapeError, "write two operands and a result"),
    "repeated-letter": ("mm,mn->mn", {}, ShapeError, "'mm' must be distinct letters, one per dim"),
    "no-letter": ("m.,kn->mn", {}, ShapeError, "'m.' must be distinct letters"),
    "letter-alone": ("mk,ln->mn", {}, ShapeError, "every letter must stand in two of the three arrays; not so k, l"),
    "letter-from-nowhere": ("mk,kn->mnz", {}, ShapeError, "must stand in two of the three arrays; not so z"),
    "dims-of-a": ("bmk,kn->bmn", {}, ShapeError, "a has 2 dims (7, 5) for letters 'bmk'"),
    "dims-of-b": ("mk,k->m", {}, ShapeError, "b has 2 dims (5, 9) for letters 'k'"),
    "extents": ("mk,nk->mn", {}, ShapeError, "k of a (5) and k of b (9) must be equal, on Grid(row=2, col=2)"),
    "two-extents": ("mk,mk->mk", {}, ShapeError, "m of a (7) and m of b (5) must be equal"),
    "unknown-axis": (GEMM, {"depth": "m"}, GridError, "no axis 'depth' on Grid(row=2, col=2)"),
    "letter-of-map": (GEMM, {"row": "z"}, LayoutError, "axis 'row' is mapped to 'z'; use one of m, k, n"),
}


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize(("subscripts", "axes", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_the_same_error_on_all_ranks(grid, subscripts, axes, kind, message):
    a, b = zeros((7, 5), grid, Layout("row", None)), zeros((5, 9), grid, Layout("row", "col"))
    with ledger.record() as moved:
        raised, text = refusal(lambda: contract(subscripts, a, b, axes), grid)
    assert raised is kind
    assert subscripts in text
    assert message in text
    assert not moved.events


@pytest.mark.grids(SQUARE)
def test_dtypes_and_grids_must_be_the_same(grid):
    a, single = zeros((7, 5), grid, Layout("row", None)), zeros((5, 9), grid, Layout(None, None), "float32")
    kind, text = refusal(lambda: contract(GEMM, a, single, {}), grid)
    assert kind is DTypeError
    assert "a is float64 and b is float32: cast one with .astype" in text

    elsewhere = zeros((5, 9), Grid(col=4), Layout(None, None))
    kind, text = refusal(lambda: contract(GEMM, a, elsewhere, {}), grid)
    assert kind is GridError
    assert "a lies on Grid(row=2, col=2) and b on Grid(col=4): make both on the same Grid object" in text


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize("out", [Layout("depth", None), Layout("row")], ids=repr)
def test_a_result_that_cannot_be_cut_so_is_an_error_on_all_ranks(grid, out):
    a = zeros((7, 7), grid, Layout("row", None))
    kind, text = refusal(lambda: contract(GEMM, a, a, {"row": "m"}, out), grid)
    assert kind is LayoutError
    assert f"{out}: " in text
