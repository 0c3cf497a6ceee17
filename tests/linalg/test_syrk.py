"""syrk, herk and gram equal NumPy's products, move the words of the closed form and take half of the flop."""

import itertools
import math
import sys

import array_api_strict
import numpy as np
import pytest

from colossal_mpi import (
    DistArray,
    DTypeError,
    GridError,
    Layout,
    LayoutError,
    OptionError,
    ShapeError,
    from_global,
    ledger,
    linalg,
)
from colossal_mpi.linalg import price
from colossal_mpi.linalg.contraction import map_layout
from colossal_mpi.linalg.factor import triangular
from tests.cases import assemble, host, inner, integers, layouts, refusal, represents, some, spread, totals

LINE, SQUARE, WIDE, CUBE = {"col": 3}, {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"a": 2, "b": 2, "c": 2}
SLIM, LONG, ONE = {"row": 1, "col": 4}, {"col": 5}, {}
ALL = (ONE, LINE, SLIM, LONG, SQUARE, WIDE, CUBE)
KINDS = {
    "syrk": (linalg.syrk, lambda a: a @ a.T),
    "herk": (linalg.herk, lambda a: a @ a.conj().T),
    "gram": (linalg.gram, lambda a: a.conj().T @ a),
}
on_kinds = pytest.mark.parametrize("kind", KINDS)


def maps(grid):
    """Return every map of some of the grid's axes to n and k."""
    places = itertools.product(["n", "k", None], repeat=len(grid.axes))
    return [{axis: x for axis, x in zip(grid.axes, place, strict=True) if x} for place in places]


@pytest.mark.grids(*ALL)
@on_kinds
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_the_product_where_a_lies_in_any_layout(grid, kind, dtype):
    product, expected = KINDS[kind]
    for shape in [(7, 5), (4, 11), (1, 9), (0, 3), (3, 0)]:
        a = integers(shape, dtype)
        for layout in some(layouts(2, grid.axes), 6):
            x = spread(a, grid, layout)
            made = product(x)
            assert represents(made, expected(a)), layout
            assert made.layout == Layout(x.layout.dims[kind == "gram"], None)


@pytest.mark.grids(*ALL)
@on_kinds
def test_maps_layouts_and_triangles(grid, kind):
    product, expected = KINDS[kind]
    a = integers((9, 7), "complex128")
    whole, outs = expected(a), some(layouts(2, grid.axes), 20, seed=1)
    parts = {None: whole, "lower": np.tril(whole), "upper": np.triu(whole)}
    x = from_global(a, grid, outs[0].with_partial())
    for axes, out, triangle in some(itertools.product(maps(grid), [None, *outs], parts), 30):
        made = product(x, axes, out, triangle)
        assert represents(made, parts[triangle]), (axes, out, triangle)
        assert out is None or made.layout == out.on(grid.axes, 2)


def pieces(n, grid, axes):
    """Return the sizes of the balanced, nested parts of n over axes."""
    parts = [np.arange(n)]
    for axis in axes:
        parts = [piece for whole in parts for piece in np.array_split(whole, grid.axes[axis])]
    return [len(piece) for piece in parts]


def formula(n, k, grid, over_n, over_k, scatter):
    """Return the words of the module's closed form, summed over the ranks of N and K."""
    rows, depths = pieces(n, grid, over_n), pieces(k, grid, over_k)
    p, q = len(rows), len(depths)
    pairs = [(rows[i], rows[i + p // 2]) for i in range(p // 2)] if p % 2 == 0 else []
    shared = sum(x * y for x, y in pairs)
    panels = n * k * ((p - 1) // 2) if p % 2 else n * k * (p // 2 - 1)
    panels += sum(x * (depth // 2) + y * -(-depth // 2) for depth in depths for x, y in pairs)
    reduced = (q - 1) * (n * (n + 1) // 2 + shared) * (1 if scatter else 2)
    ends = pieces(n, grid, (*over_n, *over_k)) if scatter else rows
    mirrored = ((n * n - sum(size * size for size in ends)) // 2 + shared) * (1 if scatter else q)
    return panels + reduced + mirrored


@pytest.mark.grids(LINE, SLIM, LONG, SQUARE, WIDE, CUBE)
@pytest.mark.parametrize("shape", [(7, 9), (16, 24), (5, 30), (2, 3)], ids=str)
def test_words_are_those_of_the_closed_form(grid, shape):
    n, k = shape
    for axes in maps(grid):
        over_n, over_k = ([axis for axis, x in axes.items() if x == letter] for letter in "nk")
        a = from_global(integers(shape), grid, Layout(over_n, over_k))
        copies = grid.size // grid.extent(axes)
        for scatter in [False, True] if over_k else [False]:
            out = Layout((*over_n, *over_k) if scatter else over_n, None)
            with ledger.record() as moved:
                linalg.syrk(a, axes, out)
            expected = copies * formula(n, k, grid, over_n, over_k, scatter)
            assert totals([moved.words], grid)[0] == expected, (axes, scatter)


@pytest.mark.grids(LINE, SLIM, LONG, WIDE)
def test_a_tall_gram_matrix_is_one_allreduce_of_its_triangle(grid):
    axes, p, n, k = tuple(grid.axes), grid.size, 7, 60
    a = from_global(integers((k, n)), grid, Layout(axes, None))
    with ledger.record() as moved:
        linalg.gram(a)
    ours, triangle = totals([moved.words], grid)[0], n * (n + 1) // 2
    sizes, full = {"k": k, "m": n, "n": n}, Layout(None, None)
    whole = price("km,kn->mn", sizes, grid.axes, dict.fromkeys(axes, "k"), a.layout, a.layout, full)
    assert ours == 2 * (p - 1) * triangle
    assert whole.total_words == 2 * (p - 1) * n * n
    with ledger.record() as moved:
        linalg.gram(a, out=Layout(axes, None), triangle="lower")
    assert totals([moved.words], grid)[0] == (p - 1) * triangle


@pytest.mark.grids(LINE, LONG, SQUARE, SLIM)
def test_panels_are_half_of_the_full_products_and_even_over_the_ranks(grid):
    axes, p = tuple(grid.axes), grid.size
    n, k = 4 * p, 6
    a = from_global(integers((n, k)), grid, Layout(axes, None))
    with ledger.record() as moved:
        linalg.syrk(a)
    panels, mirrored = n * k * (p - 1) // (2 * p), (n // p) ** 2 * (p // 2)
    assert moved.words == panels + mirrored


@pytest.mark.grids(LINE, LONG, SLIM, SQUARE)
def test_one_triangle_moves_only_the_blocks_that_lie_on_the_wrong_side(grid):
    axes, p, n, k = tuple(grid.axes), grid.size, 7, 5
    a, rows = from_global(integers((n, k)), grid, Layout(axes, None)), pieces(n, grid, axes)
    near = sum(rows[i] * rows[j] for i in range(p) for j in range(i + 1, p) if j - i <= p // 2)
    far = sum(rows[i] * rows[j] for i in range(p) for j in range(i + 1, p) if j - i >= (p + 1) // 2)
    words = {}
    for triangle in (None, "lower", "upper"):
        with ledger.record() as moved:
            linalg.syrk(a, triangle=triangle)
        words[triangle] = totals([moved.words], grid)[0]
    assert words[None] - words["lower"] == far
    assert words[None] - words["upper"] == near


@pytest.mark.grids(ONE, LINE, SLIM, SQUARE)
@pytest.mark.parametrize("letter", ["n", "k"])
def test_flop_are_half_of_the_full_products_and_even_over_the_ranks(grid, letter, monkeypatch):
    done = []

    def counted(left, right):
        done.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        return left @ right

    for module in (triangular, sys.modules[linalg.syrk.__module__]):
        monkeypatch.setattr(module, "gemm", counted)
    n, k = (64 * grid.size, 12) if letter == "n" else (64, 12 * grid.size)
    monkeypatch.setattr(triangular, "LEAF", 4)
    axes = dict.fromkeys(grid.axes, letter)
    linalg.syrk(from_global(integers((n, k)), grid, map_layout("nk", axes)), axes)
    own = 64 * (64 + 4) * 12  # flop of this rank's triangle
    assert sum(done) == (own if letter == "k" else own + 64 * 64 * 12 * (grid.size - 1))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 8, 9, 130, 257])
def test_a_packed_triangle_comes_back(n):
    square = integers((n, n))
    flat = triangular.pack(square)
    assert flat.shape == (n * (n + 1) // 2,)
    assert sorted(flat) == sorted(square[np.tril_indices(n)])
    assert np.array_equal(np.tril(triangular.unpack(flat, n)), np.tril(square))
    left, right = integers((n, 5), seed=1), integers((n, 5), seed=2)
    assert np.array_equal(np.tril(triangular.lower_product(left, right)), np.tril(left @ right.T))


@pytest.mark.grids(WIDE)
@on_kinds
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_the_error_is_within_its_bound_and_both_halves_are_the_same_bits(grid, kind, dtype):
    product, expected = KINDS[kind]
    rng = np.random.default_rng(3)
    a = rng.standard_normal((40, 300)) + (1j * rng.standard_normal((40, 300)) if dtype == "complex64" else 0)
    a = a.astype(dtype).T if kind == "gram" else a.astype(dtype)
    wide = expected(a.astype("complex128"))
    bound = 3 * np.finfo(dtype).eps * math.sqrt(302) * np.linalg.norm(a) ** 2 * (2 * math.sqrt(2))
    for axes in maps(grid):
        made = assemble(product(from_global(a, grid, Layout("row", None)), axes))
        assert np.linalg.norm(made - wide) <= bound, axes
        assert np.array_equal(made, made.T if kind == "syrk" else made.conj().T), axes


ADJOINTS = {
    "syrk": lambda a, dc: (dc + dc.T) @ a.conj(),
    "herk": lambda a, dc: (dc + dc.conj().T) @ a,
    "gram": lambda a, dc: a @ (dc + dc.conj().T),
}


@pytest.mark.grids(SQUARE, LINE)
@on_kinds
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_adjoints_are_those_of_the_docstrings(grid, kind, dtype):
    """The differential at a along h, against the cotangent dc, is the inner product of h and da (their real parts)."""
    product, _ = KINDS[kind]
    shape = (5, 7)
    n = shape[kind == "gram"]
    a, h = (from_global(integers(shape, dtype, seed), grid, Layout(next(iter(grid.axes)), None)) for seed in (1, 2))
    dc = from_global(integers((n, n), dtype, 3), grid, Layout(None, None))
    lay = Layout(None, None)
    # The quadratic part drops out of (f(a + h) - f(a - h)) / 2
    change = (product(a + h, out=lay) - product(a - h, out=lay)) / 2
    A, dC, H = a.gather(), dc.gather(), h.gather()
    da = ADJOINTS[kind](A, dC)
    total = totals([inner(change, dc)], grid)[0]
    assert total.real == np.vdot(H, da).real


@pytest.mark.grids(SQUARE, LINE)
@on_kinds
def test_blocks_need_not_be_numpy(grid, kind):
    product, expected = KINDS[kind]
    for dtype in ("float64", "complex128"):
        a = integers((7, 5), dtype)
        for axes in maps(grid):
            x = spread(a, grid, Layout(next(iter(grid.axes)), None))
            x = DistArray(array_api_strict.asarray(host(x).copy()), x.shape, x.layout, grid)
            for out in (None, Layout(tuple(grid.axes), None)):
                made = product(x, axes, out)
                assert type(made.local) is type(x.local)
                assert represents(made, expected(a)), axes


WRONG = {
    "vector": ((4,), {}, ShapeError, "syrk of shape (4,): it must be a matrix, of 2 dims"),
    "triangle": ((4, 4), {"triangle": "left"}, OptionError, "triangle='left'; use 'lower', 'upper' or None for both"),
    "axis": ((4, 4), {"axes": {"depth": "n"}}, GridError, "syrk: no axis 'depth' on Grid(row=2, col=2)"),
    "letter": ((4, 4), {"axes": {"row": "m"}}, LayoutError, "axis 'row' is mapped to 'm'; use 'n' or 'k'"),
    "out": ((4, 4), {"out": Layout("row")}, LayoutError, "Layout('row'): 1 dims for an array of 2"),
}


@pytest.mark.grids(SQUARE)
@pytest.mark.parametrize(("shape", "options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_the_same_error_on_all_ranks(grid, shape, options, kind, message):
    a = from_global(integers(shape), grid, Layout("row", *[None] * (len(shape) - 1)))
    with ledger.record() as moved:
        raised, text = refusal(lambda: linalg.syrk(a, **options), grid)
    assert raised is kind
    assert message in text
    assert not moved.events
    assert refusal(lambda: linalg.gram(np.ones((2, 2))), grid) == (
        DTypeError,
        "gram of ndarray: make a DistArray of it",
    )
