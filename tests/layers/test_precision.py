"""Training in 16 bits has float32 sums, master weights and gradients, and one loss scale on all ranks."""

import math

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, OptionError, comm, distarray, from_global
from colossal_mpi.layers import AuxiliaryLosses, Context, Parallelism, backpropagate, kernels, precision
from colossal_mpi.layers.loss import CrossEntropy, MeanSquaredError
from colossal_mpi.layers.models import GPT, GPTConfig, Llama, LlamaConfig
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.optim import OPTIMIZERS, AdamW
from colossal_mpi.layers.optim.average import MovingAverage
from colossal_mpi.layers.pipeline import Pipeline, partition
from colossal_mpi.layers.precision import LossScale, overflowing
from colossal_mpi.layout import Layout, part
from tests.cases import host
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import mode_of

LAYERS, SIZES = 2, {"vocabulary": 13, "layers": 2, "hidden": 12, "heads": 6, "inner": 11, "positions": 5, "std": 0.3}
MODELS = {
    "gpt": lambda p, dtype: GPT(GPTConfig(**SIZES, dtype=dtype), p),
    "llama": lambda p, dtype: Llama(LlamaConfig(**SIZES, groups=3, dtype=dtype), p),
}
TOKENS, LABELS = np.random.default_rng(6).integers(0, 13, (2, 7, 5))
HALVES = ("float16", "bfloat16")
ROUNDINGS = 4 + 14 * 2 * LAYERS
"""Number of roundings in a row: about 14 arrays in each pass of a block, and the arrays of both ends."""


def bound(dtype):
    return ROUNDINGS * float(ml_dtypes.finfo(dtype).eps) / 2


def gradients(p, model, scale=1.0):
    """Return the loss of two microbatches; the gradients are left in the parameters, times the scale."""
    total = 0.0
    for rows in (slice(0, 4), slice(4, 7)):
        ids, targets = (from_global(a[rows], p.grid, p.tokens()) for a in (TOKENS, LABELS))
        total += backpropagate(model, CrossEntropy(p), ids, targets, Context(scale=scale), count=LABELS.size)
    return total


def prepare(path):
    for name, make in MODELS.items():
        p = Parallelism(Grid(MPI.COMM_SELF))
        model = make(p, "float64")
        loss = gradients(p, model)
        np.savez(path / f"{name}.npz", loss=loss, **{q.name: host(q.reduce()) for q in model.parameters()})


def check(prepared, name, dtype, loss, parameters, scale):
    exact = dict(np.load(prepared / f"{name}.npz"))
    assert abs(loss - exact["loss"]) <= bound(dtype) * exact.pop("loss")
    mine = {q.name: block_and_index(q.reduce() * (1 / scale)) for q in parameters}
    assert all(block.dtype == np.float32 for block, _ in mine.values())
    assert difference(mine, exact) <= bound(dtype)


@pytest.mark.prepare(prepare)
@pytest.mark.grids(
    {}, {"col": 3}, {"row": 2, "col": 2}, {"depth": 2, "row": 1, "col": 2}, {"row": 2, "col": 1, "depth": 2}
)
def test_gradients_are_within_the_roundings(grid, prepared):
    for name, dtype, provider in [
        ("gpt", "float16", "torch"),
        ("gpt", "bfloat16", "torch"),
        ("llama", "float16", "reference"),
    ]:
        kernels.use(provider, grid)
        p = Parallelism(grid, mode_of(grid), keep_gathered=name == "gpt")
        model = MODELS[name](p, dtype)
        scale = AdamW(model.parameters()).loss_scale
        check(prepared, name, dtype, gradients(p, model, scale), model.parameters(), scale)
    kernels.use("reference", grid)


def snapshot(optimizer):
    """Return copies of weights, masters and moments."""
    arrays = {f"w/{p.name}": p.value for p in optimizer.parameters}
    return {name: host(a).copy() for name, a in (arrays | optimizer.weights() | optimizer.state()).items()}


@pytest.mark.prepare(prepare)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.grids({"data": 3}, {"data": 2, "col": 2})
def test_zero_and_an_overflow_on_one_rank(grid, prepared, dtype):
    """All ranks skip the step of an infinite gradient, and do the next one."""
    for zero in range(4):
        p = Parallelism(grid, mode_of(grid), zero=zero)
        model = MODELS["gpt"](p, dtype)
        optimizer = AdamW(model.parameters(), clip=0.5)
        before, scale = snapshot(optimizer), optimizer.loss_scale
        gradients(p, model, scale)
        planted = next(q.grad.local for q in optimizer.parameters if q.name.endswith("up.weight"))
        if grid.rank == grid.size - 1:
            planted.reshape(-1)[0] = math.inf
        with overflowing():
            assert not math.isfinite(optimizer.step())
        assert optimizer.steps == 0
        assert all(np.array_equal(array, before[name]) for name, array in snapshot(optimizer).items())
        expected = scale / 2 if dtype == "float16" else 1.0
        assert comm.collect(optimizer.loss_scale, grid) == [expected] * grid.size
        loss = gradients(p, model, expected)
        check(prepared, "gpt", dtype, loss, optimizer.parameters, expected)
        exact = dict(np.load(prepared / "gpt.npz"))
        norm = math.sqrt(sum((g**2).sum() for name, g in exact.items() if name != "loss"))
        assert optimizer.step() == pytest.approx(norm, rel=bound(dtype))
        for q in optimizer.parameters:
            master = optimizer.weights()[q.name]
            assert master.layout == q.owned
            assert np.array_equal(host(q.value), host(master.redistribute(q.value.layout)).astype(dtype))
            assert not np.array_equal(host(master), before[q.name]) or not host(master).size


class Feed:
    def __init__(self, p, microbatches, dtype, scale):
        self.p, self.microbatches, self.dtype, self.scale = p, microbatches, dtype, scale
        self.cross_entropy = CrossEntropy(p)

    def _cut(self, whole, microbatch):
        return from_global(whole[slice(*part(7, self.microbatches, microbatch))], self.p.grid, self.p.tokens())

    def context(self, microbatch):
        return Context(scale=self.scale)

    def inputs(self, microbatch):
        return self._cut(TOKENS, microbatch)

    def loss(self, y, microbatch):
        return self.cross_entropy.forward(y, self._cut(LABELS, microbatch), LABELS.size)

    def loss_backward(self, cache):
        return self.cross_entropy.backward(cache, self.scale)

    def activation_spec(self, microbatch):
        first, stop = part(7, self.microbatches, microbatch)
        return (stop - first, 5, SIZES["hidden"]), self.p.stream(), self.dtype


@pytest.mark.prepare(prepare)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.grids({"pipe": 2, "data": 2})
def test_tied_weights_of_two_stages(grid, prepared, dtype):
    p = Parallelism(grid.at(pipe=grid.coords["pipe"]), zero=1)
    pipeline = Pipeline(partition(MODELS["gpt"](p, dtype), grid), grid, "zero-bubble")
    optimizer = AdamW(pipeline.parameters())
    loss = pipeline.step(Feed(p, 3, dtype, optimizer.loss_scale))
    check(prepared, "gpt", dtype, loss, optimizer.parameters, optimizer.loss_scale)
    optimizer.step()
    found = {q.name: (host(optimizer.weights()[q.name]), host(q.value)) for q in optimizer.parameters}
    everywhere = comm.collect((p.grid.rank, found["tokens.weight"]), grid)
    for at, (master, value) in everywhere:
        assert all(np.array_equal(m, master) and np.array_equal(v, value) for rank, (m, v) in everywhere if rank == at)


@pytest.mark.grids({"data": 2, "col": 2})
def test_every_optimizer_steps_its_masters_as_float32_weights(grid):
    p = Parallelism(grid, "1d", zero=1)
    for name, make in OPTIMIZERS.items():
        half, single = (make(MODELS["gpt"](p, dtype).parameters(), lr=0.03) for dtype in ("float16", "float32"))
        for a, b in zip(half.parameters, single.parameters, strict=True):
            g = from_global(np.random.default_rng(1).standard_normal(a.shape), grid, a.owned, dtype="float32")
            a.accumulate(g * half.loss_scale)
            b.accumulate(g)
        assert half.step() == single.step(), name
        for a, b in zip(half.parameters, single.parameters, strict=True):
            assert np.array_equal(host(half.weights()[a.name]), host(b.share())), (name, a.name)
        assert half.state().keys() == single.state().keys()


def test_masters_are_what_was_drawn_or_loaded():
    p = Parallelism(Grid(MPI.COMM_SELF))
    half, single = (MODELS["gpt"](p, dtype) for dtype in ("bfloat16", "float32"))
    first = next(half.parameters())
    first.value.local[0, :] = 0.75
    for a, b in zip(half.parameters(), single.parameters(), strict=True):
        master, drawn = host(a.master()), host(b.value)
        if a is first:
            assert np.all(master[0] == 0.75)
            master, drawn = master[1:], drawn[1:]
        assert np.array_equal(master, drawn)
        assert np.any(master != master.astype(ml_dtypes.bfloat16).astype("float32")) or a.name.endswith(
            ("bias", "gain")
        )


def test_a_scale_grows_and_falls():
    scale = LossScale(8.0, patience=3)
    assert [scale.follow(1.0) for _ in range(3)] == [True] * 3
    assert (scale.value, scale.good) == (16.0, 0)
    assert [scale.follow(norm) for norm in (1.0, math.inf, math.nan)] == [True, False, False]
    assert (scale.value, scale.good) == (4.0, 0)
    other = LossScale()
    other.restore(scale.state())
    assert other.state() == scale.state()
    assert [scale.follow(math.inf) for _ in range(3)] == [False] * 3
    assert scale.value == 1.0
    assert LossScale.of({"float32"}) is None


def test_averages_of_16_bit_weights_are_float32():
    q = next(MODELS["gpt"](Parallelism(Grid(MPI.COMM_SELF)), "float16").parameters())
    average = MovingAverage([q], decay=0.999)
    average.updates = 10**6
    whole = host(q.value).astype("float64")
    q.value.local[...] += 1
    average.update()
    assert np.allclose(host(average.averages[q.name]) - whole, 0.001, rtol=0, atol=1e-5)
    with average.applied():
        assert np.array_equal(host(q.value), host(average.averages[q.name]).astype("float16"))


LONG = 70_000
"""A sum of this number of ones is more than the greatest float16."""


def long_sums(provider):
    """Yield, by name, results of kernels that sum 70,000 float16 ones, with the right sums."""
    chosen = kernels.load(provider)
    one = np.ones((1, LONG), "float16")
    gain = np.ones(LONG, "float16")
    y, statistics = chosen.norm(2 * one, gain, None, False, 0.0, LONG)
    yield "norm", y, 1
    dx, dgain, _ = chosen.norm_backward(one, 2 * one, gain, statistics, LONG)
    yield "norm dx", dx, 0
    rows, few = np.ones((LONG, 2), "float16"), np.ones(2, "float16")
    _, statistics = chosen.norm(rows * np.array([1, 3], "float16"), few, few, True, 0.0, 2)
    _, dgain, dbias = chosen.norm_backward(rows, rows * np.array([1, 3], "float16"), few, statistics, 2)
    yield "norm gain", dgain, [-LONG, LONG]
    yield "norm bias", dbias, LONG
    labels = np.zeros((1,), "int64")
    sums = chosen.cross_entropy_sums(one, labels, chosen.peak(one), 0, 0.5, 0.5)
    yield "cross-entropy", sums, [[LONG], [0]]
    yield "lookup", chosen.lookup_backward(rows, np.zeros(LONG, "int64"), 0, 1), LONG
    q = np.ones((1, 1, 1, 4), "float16")
    k = np.ones((1, LONG, 1, 4), "float16")
    out, statistics = chosen.attention(q, k, k, causal=False)
    yield "attention", out, 1
    image = np.ones((1, 1, 280, 250), "float16")
    yield "mean", chosen.mean_pool(image, (280, 250), (1, 1), (0, 0)), 1
    yield "route", chosen.route(one, 1, False)[-1], 1 + math.log(LONG)


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_no_sum_of_kernels_overflows(provider):
    for name, result, expected in long_sums(provider):
        # one rounding to float16; float32 sums of numbers near 1 that cancel
        assert np.allclose(result, expected, rtol=2.0**-11, atol=2.0**-20), (name, result)


def test_no_sum_of_arrays_and_losses_overflows():
    grid = Grid(MPI.COMM_SELF)
    p = Parallelism(grid)
    ones = distarray.full((1, LONG, 1), 1.0, grid, Layout(None, None, None), "float16")
    assert ones.sum() == LONG
    assert host(ones.sum_over([0, 1])) == [LONG]
    assert host(ones.sum_over([0, 1])).dtype == np.float32
    value, cache = MeanSquaredError().forward(ones * 3, ones)
    assert value == 4.0
    assert MeanSquaredError().backward(cache, 2.0**15).dtype == np.float16
    assert np.allclose(host(MeanSquaredError().backward(cache, 2.0**15)), 2 * 2 * 2.0**15 / LONG, rtol=2.0**-11)
    logits = distarray.full((1, LONG), 1.0, grid, Layout(None, None), "float16")
    loss, cache = CrossEntropy(p).forward(logits, from_global(np.zeros(1, "int64"), grid, Layout(None)))
    assert loss == pytest.approx(math.log(LONG), rel=1e-6)
    d = host(CrossEntropy(p).backward(cache, 2.0**10))
    assert d.dtype == np.float16
    assert d[0, 1] == pytest.approx(2.0**10 / LONG, rel=1e-3)


@pytest.mark.grids({}, {"data": 2, "col": 2})
def test_experts_within_the_roundings(grid):
    """Many float16 logits are equal; the reference takes the float16 weights exactly, in float64."""
    results = []
    for dtype in ("float16", "float64"):
        p = Parallelism(grid, mode_of(grid))
        layer = MoE(6, 9, 3, p, "moe", top_k=3, balance=0.5, z_loss=0.1, std=0.5, out_std=0.5, dtype=dtype)
        for q in layer.parameters():
            q.value = q.value.astype("float16").astype(dtype)
        rng = np.random.default_rng(5)
        x, dy = (from_global(rng.standard_normal((4, 5, 6)), grid, p.stream(), dtype="float16") for _ in range(2))
        y, cache = layer.forward(x.astype(dtype), Context(auxiliary=AuxiliaryLosses(values={}), scale=4.0))
        dx = layer.backward((dy * 4).astype(dtype), cache)
        assert y.dtype == dx.dtype == np.dtype(dtype)
        results.append({"y": y, "dx": dx} | {q.name: q.reduce() for q in layer.parameters()})
    exact = {name: array.gather() for name, array in results[1].items()}
    mine = {name: block_and_index(array) for name, array in results[0].items()}
    assert difference(mine, exact) <= 16 * float(np.finfo("float16").eps)


def test_bfloat16_needs_its_package(monkeypatch):
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(
        OptionError, match="needs the package ml_dtypes: install the extra 'bfloat16', or use 'float16'"
    ):
        MODELS["gpt"](Parallelism(Grid(MPI.COMM_SELF)), "bfloat16")
    assert precision.require_dtype(np.float32) == "float32"
