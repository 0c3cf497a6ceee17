"""Recomputation gives the same bits as kept arrays, and its words and bytes equal their closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, OptionError, comm, from_global, ledger, random
from colossal_mpi.layers import (
    GELU,
    Attention,
    AuxiliaryLosses,
    Context,
    Conv2d,
    Gated,
    LayerNorm,
    Linear,
    MoE,
    Parallelism,
    ReLU,
    RMSNorm,
    SelfAttention,
    Sequential,
    SiLU,
    TransformerBlock,
    backpropagate,
    recompute,
)
from colossal_mpi.layers.loss import CrossEntropy, MeanSquaredError
from colossal_mpi.layers.models import GPT, Bert, BertConfig, GPTConfig, Llama, LlamaConfig, describe
from colossal_mpi.layers.pipeline import Pipeline, partition
from colossal_mpi.layers.recompute import Discard, Recompute
from tests.cases import host
from tests.layers.test_pipeline import GPTFeed
from tests.reference import gpt_case as gpt
from tests.reference.modes import few, mode_of
from tests.reference.saved import saved_arrays
from tests.reference.words import recompute_words


def norm(p):
    """Return a norm, and a stream that it takes."""
    return RMSNorm(6, p, "norm", dtype="float64"), random.normal((4, 8, 6), p.grid, p.stream(), 0, "x")


def activation(p):
    """Return an activation, and a stream that it takes."""
    return GELU(), random.normal((4, 8, 6), p.grid, p.stream(), 0, "x")


def heads_activation(letters, dims):
    """Return a function that makes an activation and an array inside a block that it takes."""
    inner = "a" if "a" in letters else letters[-1]
    return lambda p: (ReLU(), random.normal((4, 8, *dims), p.grid, p.inside(letters, inner), 0, "x"))


def images_activation(p):
    """Return an activation, and images that it takes."""
    return ReLU(), random.normal((4, 6, 7, 8), p.grid, p.stream("bhyx"), 0, "x")


SIZES = {
    "vocabulary": 13,
    "layers": 2,
    "hidden": 12,
    "heads": 6,
    "inner": 11,
    "positions": 5,
    "std": 0.3,
    "dtype": "float64",
}
MODELS = (
    lambda p: GPT(GPTConfig(**SIZES, dropout=0.2), p),
    lambda p: Llama(LlamaConfig(**SIZES, groups=3), p),
    lambda p: Bert(BertConfig(**SIZES, dropout=0.1, next_sentence=False), p),
    lambda p: Llama(LlamaConfig(**SIZES, groups=1, qk_norm=True, sliding_window=3), p),
    lambda p: Llama(LlamaConfig(**SIZES, groups=6, qk_norm=True), p),
)
CHOICES = ("full", "selective", ("attention", "mlp", "norm"), ("block", "norm", "activation"))
KEEP = True, False, True, True, False
TRIED = CHOICES, CHOICES[:2], CHOICES[2:], CHOICES[::2], CHOICES[:2]
TOKENS, LABELS = np.random.default_rng(6).integers(0, 13, (2, 7, 5))


def same(mine, exact):
    """Require the same bits, and that no gradient passes by being zero."""
    assert mine.keys() == exact.keys()
    for name, value in exact.items():
        assert np.array_equal(mine[name], value), name
        assert np.any(value) or not np.size(value) or not name.endswith("attention.out.weight")
    assert exact["loss"] > 0.1


def decoder(make, p, kinds):
    """Return the loss and the gradients of a step of two microbatches."""
    model, loss, total = recompute(make(p), kinds), CrossEntropy(p), 0.0
    for first, rows in ((0, slice(0, 4)), (4, slice(4, 7))):
        ids, targets = (from_global(a[rows], p.grid, p.tokens()) for a in (TOKENS, LABELS))
        total += backpropagate(model, loss, ids, targets, Context(step=3, sample=first), count=LABELS.size)
    return {"loss": np.float64(total)} | {q.name: host(q.reduce()) for q in model.parameters()}


@pytest.mark.grids(
    {}, {"col": 3}, {"row": 2, "col": 2}, {"depth": 2, "row": 1, "col": 2}, {"row": 2, "col": 1, "depth": 2}
)
def test_models_with_dropout_have_the_same_bits(grid):
    for make, keep, choices in zip(MODELS, KEEP, TRIED, strict=True):
        p = Parallelism(grid, mode_of(grid), keep)
        exact = decoder(make, p, "none")
        for kinds in choices:
            same(decoder(make, p, kinds), exact)


@pytest.mark.grids({"data": 3}, {"data": 2, "col": 2}, {"data": 2, "row": 2})
def test_zero_has_the_same_bits(grid):
    for zero, keep in ((0, True), (1, False), (2, True), (3, True)):
        p = Parallelism(grid, mode_of(grid), keep, zero)
        exact = decoder(MODELS[0], p, "none")
        for kinds in CHOICES[: 2 if zero < 3 else 3]:
            same(decoder(MODELS[0], p, kinds), exact)


def mixture(p, kinds):
    """Return the loss, the experts' losses and the gradients of a block with experts."""
    experts = {"experts": 3, "top_k": 2, "balance": 0.5, "z_loss": 0.1, "activation": "swiglu"}
    block = TransformerBlock(10, 5, 7, p, "block", experts=experts, dropout=0.1, std=0.5, dtype="float64")
    model, own = recompute(Sequential(block), kinds), {}
    x, target = (random.normal((7, 5, 10), p.grid, p.stream(), 0, name) for name in ("x", "target"))
    mask = from_global(np.arange(5) < np.array([5, 3, 4, 5, 1, 2, 5])[:, None], p.grid, p.tokens())
    loss = backpropagate(model, MeanSquaredError(), x, target, Context(auxiliary=AuxiliaryLosses(0.5, own), mask=mask))
    return {"loss": np.float64(loss), **own} | {q.name: host(q.reduce()) for q in model.parameters()}


@few
def test_losses_of_experts_are_reported_once(grid):
    p = Parallelism(grid, mode_of(grid))
    for kinds in ("full", "selective", ("mlp",)):
        same(mixture(p, kinds), mixture(p, "none"))


@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 0), ("zero-bubble", 1), ("interleaved", 2), ("gpipe", 3)])
@pytest.mark.grids({"pipe": 2, "data": 2})
def test_pipelines_have_the_same_bits(grid, schedule, zero):
    place, results = grid.at(pipe=grid.coords["pipe"]), []
    for kinds in ("none", "full", "selective"):
        p = Parallelism(place, mode_of(place), zero=zero)
        chunks = partition(
            recompute(GPT(replace(gpt.CONFIG, dropout=0.2), p), kinds, schedule == "zero-bubble"),
            grid,
            2 if schedule == "interleaved" else 1,
        )
        pipeline = Pipeline(chunks, grid, schedule)
        loss = pipeline.step(GPTFeed(p, 3))
        results.append({"loss": np.float64(loss)} | {q.name: host(q.reduce()) for q in pipeline.parameters()})
    for mine in results[1:]:
        same(mine, results[0])


@pytest.mark.parametrize("keep", [True, False], ids=["gathered", "stored"])
@pytest.mark.grids({"col": 3}, {"row": 2, "col": 2}, {"depth": 2, "row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2})
def test_words_equal_their_closed_form(grid, keep):
    sizes, mode, words = {"b": 7, "s": 5, "h": 10, "a": 5, "d": 2, "f": 13}, mode_of(grid), {}
    for kinds in ("none", "full", "selective"):
        p = Parallelism(grid, mode, keep)
        block = TransformerBlock(10, 5, 13, p, "block", dtype="float64")
        model = recompute(Sequential(block), kinds)
        x = random.normal((7, 5, 10), grid, p.stream(), 0, "x")
        with ledger.record() as moved:
            y, cache = model.forward(x, Context())
            model.backward(y, cache)
        words[kinds] = sum(comm.collect(moved.words, grid))
    for kinds in ("full", "selective"):
        more = recompute_words(mode, grid.axes, **sizes, kinds=kinds, keep_gathered=keep)
        assert words[kinds] - words["none"] == more


@pytest.mark.grids({}, {"row": 2, "col": 2})
def test_memory_between_the_passes_falls(grid):
    """A token keeps 16 h in a block, 10 h with "selective" and h with "full", besides vectors and statistics."""
    b, s, h = 4, 8, 64
    held = {}
    for kinds in ("none", "selective", "full"):
        p = Parallelism(grid, mode_of(grid), keep_gathered=False)
        model = recompute(Sequential(TransformerBlock(h, 4, 4 * h, p, "block", dtype="float64")), kinds)
        x = random.normal((b, s, h), grid, p.stream(), 0, "x")
        weights = {id(q.value.local) for q in model.parameters()}
        held[kinds] = sum(a.nbytes for a in saved_arrays(model.forward(x, Context())[1]) if id(a) not in weights)
    one = 8 * b * s * h // grid.size
    statistics = 8 * b * s * (2 * 2 + 2 * 4)
    assert held["full"] == one
    assert 10 * one <= held["selective"] <= 10 * one + statistics
    assert 16 * one <= held["none"] <= 16 * one + statistics


H, A, D = 6, 3, 4
EVERY_LAYER = {
    "product": (norm, lambda p: Linear("bsh,hf->bsf", {"h": H, "f": 7}, "f", p, "m", dtype="float64")),
    "products": (norm, lambda p: SelfAttention(H, A, p, "m", groups=1, width=2, dtype="float64").layers[0]),
    "norm": (activation, lambda p: LayerNorm(H, p, "m", dtype="float64")),
    "activation": (norm, lambda p: GELU()),
    "gate": (heads_activation("bsth", (2, H)), lambda p: Gated(SiLU())),
    "convolution": (images_activation, lambda p: Conv2d(H, 5, 3, p, "m", dtype="float64")),
    "attention": (heads_activation("bstad", (3, A, D)), lambda p: Attention(p)),
    "experts": (norm, lambda p: MoE(H, 7, 3, p, "m", std=0.5, dtype="float64")),
}


@pytest.mark.parametrize("keep", [True, False], ids=["gathered", "stored"])
@pytest.mark.grids({}, {"col": 2}, {"row": 2, "col": 2}, {"seq": 2})
def test_every_layer_makes_the_output_of_a_norm_or_an_activation_again(grid, keep):
    """No layer's cache holds the output before it, and the gradients have the bits of a cache that does."""
    p = Parallelism(grid, mode_of(grid), keep)
    for name, (before, layer) in EVERY_LAYER.items():
        first, x = before(p)
        model, ctx = Sequential(first, layer(p)), Context(order=p.order(x.shape[1]))
        passes, exact = [], first.forward(x, ctx)[0]
        for _ in range(2):
            for q in model.parameters():
                q.grad = None
            y, cache = model.forward(x, ctx)
            dy = y if isinstance(y, tuple) else y * y
            dx = model.backward(dy, cache)
            passes.append([dx, *(q.reduce() for q in model.parameters())])
            model = recompute(model, "selective")
        held = [a for a in saved_arrays(cache[1]) if a.shape == exact.local.shape and np.array_equal(a, exact.local)]
        assert not held or not exact.local.size, name
        for mine, kept in zip(*passes, strict=True):
            assert np.array_equal(mine.local, kept.local), name


def test_a_model_stays_what_it_was():
    p = Parallelism(Grid(MPI.COMM_SELF))
    model = MODELS[0](p)
    names, description = [q.name for q in model.parameters()], describe(model)
    assert recompute(model, ("block", "norm")) is model
    assert recompute(model, "full") is model
    assert [q.name for q in model.parameters()] == names
    assert describe(model) == description
    kinds = [type(layer) for layer in model.layers]
    assert kinds.count(Recompute) == SIZES["layers"]
    assert kinds.count(Discard) == 1
    assert not any(isinstance(layer.layer, Recompute) for layer in model.layers if isinstance(layer, Recompute))


@pytest.mark.parametrize("kinds", ["some", ("block", "head")])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(
        OptionError, match="use one of 'none', 'selective', 'full', or some of the kinds block, attention"
    ):
        recompute(Sequential(), kinds)
