"""Every layer's backward pass equals finite differences of its forward pass, on one rank and on cut arrays."""

import functools

import numpy as np
import pytest

from colossal_mpi import ShapeError, from_global, random
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention.rotary import Rotary, Rotation
from colossal_mpi.layers.attention.self_attention import Attention, SelfAttention
from colossal_mpi.layers.embedding import Embedding, SegmentEmbedding
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.moe import MoE
from tests.reference import layer_case as case

B, S, H, F, A, V = 3, 5, 6, 7, 3, 11
SIZES = {"b": B, "s": S, "h": H, "t": 3, "a": A, "d": 2, "f": F, "v": V, "p": 2, "c": 2, "y": 5, "x": 7, "k": 2}
COMMON = {"dtype": "float64", "std": 0.5}
LAYERS = {
    "attention-core": Attention,
    "attention-core-all": lambda p: Attention(p, causal=False),
    "attention": lambda p: SelfAttention(H, A, p, "attention", **COMMON),
    "groups": lambda p: SelfAttention(H, 6, p, "groups", groups=3, width=2, rotary=Rotary(9.0), **COMMON),
    "one-group": lambda p: SelfAttention(H, 4, p, "group", groups=1, width=2, rotary=Rotary(9.0), **COMMON),
    "rotation": lambda p: Rotation(Rotary(), 2),
    "segments": lambda p: SegmentEmbedding(1, H, p, "segments", **COMMON),
    "moe": lambda p: MoE(H, F, 3, p, "moe", bias=True, out_std=0.5, **COMMON),
}
TABLE = (
    *(
        "up",
        "down",
        "heads",
        "gates",
        "layer-norm",
        "rms-norm",
        "gelu-tanh",
        "gelu",
        "gelu-sigmoid",
        "silu",
        "relu",
        "tanh",
        "geglu",
        "softmax",
    ),
    *("dropout", "drop-path", "positions-given", "first-classes", "mean-classes", "mlp-swiglu", "block-gpt"),
    *(
        "block-bert",
        "convolution-strides",
        "convolution-back",
        "patches-positions",
        "max-pool-gaps",
        "mean-pool-overlapping",
    ),
)
LAYERS |= {name: functools.partial(case.layer_of, name, n=SIZES) for name in TABLE}
MODES = {(): None, ("col",): "1d", ("row", "col"): "2d", ("depth", "col"): "2.5d", ("col", "depth"): "3d"}


def parallelism(grid):
    return Parallelism(grid, MODES[tuple(grid.axes)])


def slope(function, array, direction):
    """Return the derivative of `function` along `direction` at the DistArray `array`, to fourth order.

    With h = 1e-3 the truncation error is of order h^4 and the rounding error of order eps / h.
    """
    h, start, total = 1e-3, array.local.copy(), 0.0
    for steps, weight in ((1, 8.0), (2, -1.0)):
        for sign in (1, -1):
            array.local[...] = start + sign * steps * h * direction.local
            total += sign * weight * function()
    array.local[...] = start
    return total / (12 * h)


def input_of(name, p, grid):
    if name in TABLE:
        return case.input_of(name, p, SIZES)
    shape, layout = (B, S, H), p.stream()
    if name == "rotation" or name.startswith("attention-core"):
        shape, layout = (B, S, 3, A, 2), p.inside("bstad", "a")
    return random.normal(shape, grid, layout, 3, "x")


def context(name):
    return case.CASES[name].ctx(SIZES) if name in TABLE else Context()


grids = pytest.mark.grids(
    {}, {"col": 2}, {"row": 2, "col": 2}, {"row": 2, "col": 3}, {"depth": 2, "col": 2}, {"col": 2, "depth": 2}
)


@grids
@pytest.mark.parametrize("name", LAYERS)
def test_backward_is_the_derivative_of_forward(grid, name):
    p = parallelism(grid)
    layer, x, ctx = LAYERS[name](p), input_of(name, p, grid), context(name)
    y, cache = layer.forward(x, ctx)
    weights = random.normal(y.shape, grid, y.layout, 4, "dy")

    def value():
        return (layer.forward(x, ctx)[0] * weights).sum()

    later = []
    dx = layer.backward(weights, cache, later)
    for work in later:
        work()
    assert dx.layout == x.layout
    tensors = {"x": (x, dx)} | {q.name: (q.value, q.reduce()) for q in layer.parameters()}
    for label, (array, gradient) in tensors.items():
        assert gradient.layout == array.layout, label
        v = random.normal(array.shape, grid, array.layout, 5, label)
        expected, scale = slope(value, array, v), max(1.0, gradient.norm() * v.norm())
        assert abs((gradient * v).sum() - expected) <= 1e-9 * scale, label
        assert gradient.norm() > 1e-3, f"{label}: a zero gradient would pass"


@grids
def test_embedding_backward_is_the_derivative_of_forward(grid):
    p = parallelism(grid)
    layer = Embedding(V, H, p, "tokens", **COMMON)
    ids = from_global(np.random.default_rng(0).integers(0, V, (B, S)), grid, p.tokens())
    y, cache = layer.forward(ids, Context())
    weights = random.normal(y.shape, grid, y.layout, 4, "dy")
    layer.backward(weights, cache)
    table, gradient = layer.table.value, layer.table.reduce()
    v = random.normal(table.shape, grid, table.layout, 5, "v")
    expected = slope(lambda: (layer.forward(ids, Context())[0] * weights).sum(), table, v)
    assert abs((gradient * v).sum() - expected) <= 1e-9 * gradient.norm() * v.norm()


@grids
def test_cross_entropy_backward_is_the_derivative_of_forward(grid):
    p = parallelism(grid)
    loss, labels = CrossEntropy(p), np.random.default_rng(0).integers(-1, V, (B, S))
    logits = random.normal((B, S, V), grid, p.inside("bsv", "v"), 3, "logits")
    y = from_global(labels, grid, p.tokens())
    gradient = loss.backward(loss.forward(logits, y, B * S)[1])
    v = random.normal(logits.shape, grid, logits.layout, 5, "v")
    expected = slope(lambda: loss.forward(logits, y, B * S)[0], logits, v)
    assert abs((gradient * v).sum() - expected) <= 1e-9 * gradient.norm() * v.norm()


@grids
@pytest.mark.parametrize("name", LAYERS)
def test_dy_may_come_in_any_layout_and_backward_may_be_called_again(grid, name):
    p = parallelism(grid)
    layer, x = LAYERS[name](p), input_of(name, p, grid)
    y, cache = layer.forward(x, context(name))
    weights = random.normal(y.shape, grid, y.layout, 4, "dy")
    dx = layer.backward(weights, cache)
    gradients = {q.name: q.reduce() for q in layer.parameters()}
    for q in layer.parameters():
        q.grad = None
    whole = weights.replicated()
    scattered = whole.redistribute(whole.layout.with_partial(*[a for a, n in grid.axes.items() if n > 1]))
    again = layer.backward(scattered, cache)
    assert again.layout == dx.layout
    assert (again - dx).norm() <= 1e-13 * dx.norm()
    for q in layer.parameters():
        assert (q.reduce() - gradients[q.name]).norm() <= 1e-13 * gradients[q.name].norm(), q.name


@pytest.mark.grids({"row": 2, "col": 2})
def test_logits_may_come_in_any_layout(grid):
    p = parallelism(grid)
    loss, labels = CrossEntropy(p), from_global(np.random.default_rng(0).integers(-1, V, (B, S)), grid, p.tokens())
    logits = random.normal((B, S, V), grid, p.inside("bsv", "v"), 3, "logits")
    assert loss.forward(logits.replicated(), labels, 9)[0] == loss.forward(logits, labels, 9)[0]


@grids
def test_ids_outside_the_vocabulary_are_refused(grid):
    p = parallelism(grid)
    ids = from_global(np.full((B, S), V), grid, p.tokens())
    logits = random.normal((B, S, V), grid, p.inside("bsv", "v"), 3, "logits")
    with pytest.raises(ShapeError, match=f"token ids from {V} to {V} for a vocabulary of {V}"):
        Embedding(V, H, p, "tokens").forward(ids, Context())
    with pytest.raises(ShapeError, match="token ids"):
        CrossEntropy(p).forward(logits, ids, 1)
