"""Losses and their gradients equal PyTorch's in every mode, and move the words that their docstrings state."""

import numpy as np
import pytest

from colossal_mpi import Layout, OptionError, ShapeError, comm, from_global, ledger, random
from colossal_mpi.layers.loss import CrossEntropy, MeanSquaredError
from tests.cases import assemble, block_of, host
from tests.reference import loss_case as case
from tests.reference.modes import every_mode, few, parallelism

prepared_by = pytest.mark.prepare(case.prepare)


def run(grid, name, options, logits=None):
    p = parallelism(grid)
    loss = CrossEntropy(p, **options)
    letters = "bsv" if name == "tokens" else "bv"
    if logits is None:
        logits = from_global(case.LOGITS[name], grid, p.inside(letters, "v"))
    tokens = Layout(*p.tokens().dims[: len(letters) - 1])
    labels = from_global(case.labels_of(name, **options), grid, tokens)
    value, cache = loss.forward(logits, labels, case.count_of(name, **options))
    return value, loss.backward(cache)


@prepared_by
@every_mode
@pytest.mark.parametrize("name", case.SHAPES)
def test_cross_entropy_equals_pytorch(grid, prepared, name):
    exact = np.load(prepared / "losses.npz")
    for which, options in case.OPTIONS.items():
        value, gradient = run(grid, name, options)
        loss, whole = float(exact[f"{name}/{which}/loss"]), exact[f"{name}/{which}/gradient"]
        assert abs(value - loss) <= 1e-12 * loss, which
        block = block_of(whole, gradient.layout, grid)
        assert np.max(abs(host(gradient) - block), initial=0) <= 1e-10 * abs(whole).max(), which
        assert gradient.norm() > 1e-3, which


@few
@pytest.mark.parametrize("options", [case.OPTIONS["plain"], case.OPTIONS["all"]], ids=["plain", "all"])
def test_words_of_cross_entropy_do_not_depend_on_smoothing_or_z_loss(grid, options):
    with ledger.record() as moved:
        run(grid, "tokens", options)
    c = grid.axes.get("col", 1)
    b, s, _ = case.SHAPES["tokens"]
    others = grid.size // c
    assert sum(comm.collect(moved.words, grid)) == 6 * (c - 1) * b * s + 2 * c * (others - 1)


@few
@pytest.mark.parametrize("which", ["plain", "ignore"])
def test_labels_that_count_are_counted_by_default(grid, which, monkeypatch):
    given = run(grid, "tokens", case.OPTIONS[which])[0]
    monkeypatch.setattr(case, "count_of", lambda name, **_: None)
    assert run(grid, "tokens", case.OPTIONS[which])[0] == given


@pytest.mark.grids({"row": 2, "col": 2})
def test_logits_of_partial_sums_are_summed_first(grid):
    options = case.OPTIONS["all"]
    partial = from_global(case.LOGITS["tokens"], grid, Layout(None, None, "row", partial=("col",)))
    assert run(grid, "tokens", options, partial)[0] == run(grid, "tokens", options)[0]


@few
@pytest.mark.parametrize("options", [{"smoothing": 1.5}, {"smoothing": -0.1}, {"z_loss": -1.0}])
def test_options_out_of_range_are_refused(grid, options):
    with pytest.raises(OptionError, match="smoothing must be from 0 to 1 and z_loss 0 or more"):
        CrossEntropy(parallelism(grid), **options)


@few
def test_shapes_that_do_not_fit_are_refused(grid):
    loss, labels = CrossEntropy(parallelism(grid)), from_global(np.zeros((2, 3), int), grid, Layout(None, None))
    logits = random.normal((2, 4, 5), grid, Layout(None, None, None), 0, "x")
    with pytest.raises(ShapeError, match=r"logits \(2, 4, 5\) and labels \(2, 3\)"):
        loss.forward(logits, labels, 1)


@pytest.mark.grids({}, {"row": 2}, {"row": 2, "col": 2}, {"row": 2, "col": 3})
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_mean_squared_error_of_any_layouts(grid, partial):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 7, 5, 3))
    axes = list(grid.axes)
    places = [*axes, *[None] * (3 - len(axes))]
    cut = Layout(*places[1:], None, partial=axes[:1]) if partial else Layout(*places)
    value, cache = MeanSquaredError().forward(
        from_global(x, grid, cut), from_global(target, grid, Layout(*places[::-1]))
    )
    gradient = MeanSquaredError().backward(cache)
    eps = np.finfo("float64").eps
    assert abs(value - ((x - target) ** 2).mean()) <= x.size * eps * value
    assert gradient.layout == cut.with_partial().on(grid.axes, 3)
    assert abs(assemble(gradient) - 2 * (x - target) / x.size).max() <= 4 * eps


@pytest.mark.grids({"row": 2})
def test_mean_squared_error_refuses_other_shapes_and_nothing(grid):
    x, y = (random.normal(shape, grid, Layout("row"), 0, "x") for shape in ((3,), (4,)))
    with pytest.raises(ShapeError, match=r"\(3,\) and a target of \(4,\)"):
        MeanSquaredError().forward(x, y)
    with pytest.raises(ShapeError, match="one element must count"):
        MeanSquaredError().forward(x, x, 0)
