"""Newton-Schulz on grids equals one rank's formula, reaches the polar factor, and moves the documented words."""

import array_api_strict
import numpy as np
import pytest

from colossal_mpi import (
    DistArray,
    DTypeError,
    Layout,
    LayoutError,
    OptionError,
    ShapeError,
    SingularError,
    from_global,
    ledger,
    linalg,
)
from colossal_mpi.linalg.factor.polar import COEFFICIENTS
from tests.cases import assemble, host, layouts, refusal, some, spread, totals
from tests.linalg.test_syrk import formula

ONE, LINE, SLIM, LONG = {}, {"col": 3}, {"row": 1, "col": 4}, {"row": 5}
SQUARE, WIDE, CUBE = {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"a": 2, "b": 2, "c": 2}
ALL = (ONE, LINE, SLIM, LONG, SQUARE, WIDE, CUBE)
SHAPES = [(7, 9), (9, 5), (6, 6), (13, 4), (1, 5), (2, 9)]


def normal(shape, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def reference(g, steps, constants, epsilon=1e-7):
    """Return the factor that one rank computes, with the Gram matrix of the shorter side."""
    a, b, c = constants
    x = g.conj().T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + epsilon)
    for _ in range(steps):
        gram = x @ x.conj().T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.conj().T if g.shape[0] > g.shape[1] else x


@pytest.mark.grids(*ALL)
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_every_layout_gives_the_formula_of_one_rank(grid, name, dtype):
    for shape, layout in zip(SHAPES, some(layouts(2, grid.axes), len(SHAPES)), strict=False):
        g = normal(shape, dtype)
        x = spread(g, grid, layout)
        made = linalg.newton_schulz(x, 5, name)
        expected = reference(g, 5, COEFFICIENTS[name])
        assert np.max(abs(assemble(made) - expected)) <= 1e-12 * np.max(abs(expected)), (shape, layout)
        assert made.layout == x.layout.with_partial()


@pytest.mark.grids(ONE, LINE, SQUARE, WIDE)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("name", ["cubic", "quintic"])
def test_the_convergent_ones_reach_the_polar_factor(grid, name, dtype):
    for shape, layout in zip(SHAPES, some(layouts(2, grid.axes, False), len(SHAPES)), strict=False):
        g = normal(shape, dtype)
        made = assemble(linalg.newton_schulz(from_global(g, grid, layout), None, name))
        u, values, v = np.linalg.svd(g.astype("complex128"), full_matrices=False)
        bound = 10 * max(shape) * np.finfo(dtype).eps
        assert np.linalg.norm(made - u @ v) <= bound * values[0] / values[-1], shape
        assert np.linalg.norm(np.linalg.svd(made)[1] - 1) <= bound, shape


@pytest.mark.grids(SQUARE)
def test_muon_brings_singular_values_near_1(grid):
    g = normal((12, 20))
    made = linalg.newton_schulz(from_global(g, grid, Layout("row", "col")))
    values = np.linalg.svd(assemble(made))[1]
    assert 0.5 < values.min() <= values.max() < 1.3


@pytest.mark.grids(SQUARE, LINE)
def test_in_place_writes_the_blocks(grid):
    for shape in SHAPES:
        g = from_global(normal(shape), grid, Layout(None, list(grid.axes)[-1]))
        expected, block = linalg.newton_schulz(g), g.local
        made = linalg.newton_schulz(g, in_place=True)
        assert made is g
        assert made.local is block
        assert np.array_equal(host(block), host(expected))


@pytest.mark.grids(SQUARE)
def test_constants_may_differ_from_step_to_step(grid):
    g = normal((5, 8))
    x = from_global(g, grid, Layout("row", "col"))
    constants = [(3.0, -3.2, 1.2), (2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]
    made, expected = linalg.newton_schulz(x, 3, constants), g / (np.linalg.norm(g) + 1e-7)
    for a, b, c in constants:
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    assert np.max(abs(assemble(made) - expected)) <= 1e-12


@pytest.mark.grids(LINE, SLIM, LONG, SQUARE, WIDE, CUBE)
@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (12, 24), (6, 6)], ids=str)
@pytest.mark.parametrize("name", ["muon", "cubic"])
def test_words_are_those_of_the_formula_and_no_message_is_the_whole_matrix(grid, shape, name):
    short, long = sorted(shape)
    for layout in some(layouts(2, grid.axes, False), 6):
        x = from_global(normal(shape), grid, layout)
        dims, parts = x.layout.dims, [grid.extent(axes) for axes in x.layout.dims]
        kept = 1 if shape[0] > shape[1] or (shape[0] == shape[1] and parts[1] > parts[0]) else 0
        over, summed = dims[kept], dims[1 - kept]
        with ledger.record() as moved:
            linalg.newton_schulz(x, 2, name)
        each = formula(short, long, grid, over, summed, False) + short * long * (parts[kept] - 1)
        each += formula(short, short, grid, over, summed, False) if name == "muon" else 0
        used = parts[0] * parts[1]
        assert totals([moved.words], grid)[0] == grid.size // used * (2 * each + 2 * (used - 1)), layout
        panels = [event.words for event in moved.events if event.op == "all_to_all"]
        assert all(words < short * long for words in panels)


@pytest.mark.grids(SQUARE, LINE)
def test_blocks_need_not_be_numpy(grid):
    for dtype in ("float32", "complex128"):
        g = normal((7, 5), dtype)
        x = from_global(g, grid, Layout(next(iter(grid.axes)), None))
        x = DistArray(array_api_strict.asarray(host(x)), x.shape, x.layout, grid)
        for steps, name in ((5, "muon"), (None, "quintic")):
            made = linalg.newton_schulz(x, steps, name, in_place=True)
            assert type(made.local) is type(x.local)


@pytest.mark.grids(ONE, SQUARE)
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(2.0**1022, "float64"), (2.0**664, "float64"), (2.0**-664, "float64"), (2.0**-1022, "float64"),
     (2.0**125, "float32"), (2.0**-120, "float32"), (2.0**13, "float16"), (2.0**-14, "float16")],
)  # fmt: skip
def test_the_factor_does_not_depend_on_the_scale(grid, scale, dtype):
    g = (normal((6, 9)) / 2).astype(dtype)
    layout = Layout(*[*grid.axes, None, None][:2])
    made, expected = (
        assemble(linalg.newton_schulz(from_global(x, grid, layout), 5, "quintic", 0.0)).astype("float64")
        for x in ((g * np.asarray(scale, "float64")).astype(dtype), g)
    )
    assert np.max(abs(made - expected)) <= 40 * np.finfo(dtype).eps


@pytest.mark.grids(LINE, SQUARE)
def test_zeros_stay_zeros_and_have_no_polar_factor(grid):
    zeros = from_global(np.zeros((4, 6)), grid, Layout(None, list(grid.axes)[-1]))
    for epsilon in (1e-7, 0.0):
        assert not linalg.newton_schulz(zeros, epsilon=epsilon).norm()
    kind, text = refusal(lambda: linalg.newton_schulz(zeros, None, "quintic"), grid)
    assert kind is SingularError
    assert "it must have full rank" in text


@pytest.mark.grids(SQUARE)
def test_what_does_not_fit_is_the_same_error_on_all_ranks(grid):
    def array(shape=(4, 6), dtype="float64", partial=()):
        return from_global(np.ones(shape, dtype), grid, Layout(*[None] * len(shape), partial=partial))

    for call, kind, message in [
        (lambda: linalg.newton_schulz(array((4,))), ShapeError, "newton_schulz of shape (4,): it must be a matrix"),
        (lambda: linalg.newton_schulz(array(dtype="int64")), DTypeError, "newton_schulz of int64: use a float"),
        (lambda: linalg.newton_schulz(np.ones((2, 2))), DTypeError, "make a DistArray of it"),
        (lambda: linalg.newton_schulz(array(), -1), OptionError, "steps=-1"),
        (lambda: linalg.newton_schulz(array(), None), OptionError, "'muon' never converges"),
        (lambda: linalg.newton_schulz(array(), 2, "quartic"), OptionError, "use 'muon', 'cubic', 'quintic', (a, b, c)"),
        (lambda: linalg.newton_schulz(array(), 2, [(1, 2, 3)]), OptionError, "or as many as steps"),
        (lambda: linalg.newton_schulz(array(partial="row"), in_place=True), LayoutError, "it holds partial sums"),
    ]:
        raised, text = refusal(call, grid)
        assert raised is kind
        assert message in text
