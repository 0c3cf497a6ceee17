"""A table of layers with their inputs. `torch_layers` has PyTorch's layers under the same names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from colossal_mpi import Layout, from_global, random
from colossal_mpi.layers import Context, Layer, Parallelism
from colossal_mpi.layers.activation import GELU, Gated, ReLU, SiLU, Softmax, Tanh
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.block import MLP, TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.conv import Conv2d, PatchEmbedding
from colossal_mpi.layers.dropout import Dropout, DropPath
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm, RMSNorm
from colossal_mpi.layers.pooling import AvgPool2d, ClassifierHead, FirstPool, MaxPool2d, MeanPool
from tests.reference.gpt_case import block_and_index, difference

SIZES = {"b": 5, "s": 7, "h": 9, "t": 3, "a": 3, "d": 3, "f": 10, "v": 11, "p": 2, "c": 3, "y": 8, "x": 9, "k": 2}
"""Nothing divides; p are the pairs of a gated activation, c the channels of an image and k the side of a patch."""

RATE, STEP, SAMPLE = 0.3, 2, 3
LLAMA = {"groups": 1, "width": 4, "rotary": Rotary()}
CONTEXT = Context(step=STEP, sample=SAMPLE)


@dataclass(frozen=True)
class Case:
    """A layer, and its input: letters of the stream, of the inside if `inner` is given, or data as they come."""

    make: Callable[[Parallelism, dict], Layer]
    letters: str = "bsh"
    inner: str = ""
    ctx: Callable[[dict], Context] = lambda n: CONTEXT


def product(subscripts, inner, letters="bsh", **options):
    def make(p, n):
        return Linear(subscripts, n, inner, p, "m", dtype="float64", **options)

    return Case(make, letters, "" if "h" in letters else inner)


def plain(layer, letters="bsf", inner="f"):
    return Case(lambda p, n: layer(), letters, inner)


def norm(kind, **options):
    return Case(lambda p, n: kind(n["h"], p, "m", dtype="float64", **options))


def mlp(activation, **options):
    return Case(lambda p, n: MLP(n["h"], n["f"], p, "m", activation=activation, dtype="float64", **options))


def block(**options):
    return Case(lambda p, n: TransformerBlock(n["h"], n["a"], n["f"], p, "m", dtype="float64", **options))


def drop(kind, letters="bsh", inner="", train=True):
    ctx = dataclasses.replace(CONTEXT, train=train)
    return Case(lambda p, n: kind(RATE, "m", seed=1), letters, inner, lambda n: ctx)


def convolution(kernel, into, **options):
    letters, inputs, outputs = {"inside": ("bhyx", "h", "f"), "stream": ("bfyx", "f", "h")}[into]

    def make(p, n):
        return Conv2d(n[inputs], n[outputs], kernel, p, "m", into=into, dtype="float64", **options)

    return Case(make, letters, "" if into == "inside" else "f")


def positions(p, n):
    count = 1 + (n["y"] // n["k"]) * (n["x"] // n["k"])
    return PositionEmbedding(count + 2, n["h"], p, "m.positions", dtype="float64")


def patches(*then, **options):
    def make(p, n):
        layer = PatchEmbedding(n["c"], n["k"], n["h"], p, "m", dtype="float64", **options)
        return Sequential(layer, *[following(p, n) for following in then])

    return Case(make, "images")


def positioned(places=lambda n: None):
    def make(p, n):
        return PositionEmbedding(n["s"] + 2, n["h"], p, "m", dtype="float64")

    return Case(make, ctx=lambda n: Context(positions=places(n)))


def tied(p, n):
    table = Embedding(n["v"], n["h"], p, "m", dtype="float64")
    return Sequential(table, Linear("bsh,vh->bsv", n, "v", p, "m.head", bias=False, weight=table.table))


CASES = {
    "up": product("bsh,hf->bsf", "f"),
    "up-without-bias": product("bsh,hf->bsf", "f", bias=False),
    "down": product("bsf,fh->bsh", "f", "bsf"),
    "heads": product("bsh,htad->bstad", "a"),
    "heads-down": product("bsad,adh->bsh", "a", "bsad"),
    "gates": product("bsh,hpf->bspf", "f"),
    "classifier": product("bsh,hv->bsv", "v"),
    "vector": product("bh,hv->bv", "v", "bh", replicate="s"),
    "layer-norm": norm(LayerNorm),
    "layer-norm-bert": norm(LayerNorm, eps=1e-12),
    "layer-norm-eps": norm(LayerNorm, eps=0.5),
    "rms-norm": norm(RMSNorm),
    "rms-norm-eps": norm(RMSNorm, eps=0.5),
    "gelu-tanh": plain(GELU),
    "gelu": plain(lambda: GELU("none")),
    "gelu-sigmoid": plain(lambda: GELU("sigmoid")),
    "silu": plain(SiLU),
    "relu": plain(ReLU),
    "tanh": plain(Tanh),
    "swiglu": plain(lambda: Gated(SiLU()), "bspf"),
    "geglu": plain(lambda: Gated(GELU("none")), "bspf"),
    "geglu-tanh": plain(lambda: Gated(GELU()), "bspf"),
    "geglu-sigmoid": plain(lambda: Gated(GELU("sigmoid")), "bspf"),
    "reglu": plain(lambda: Gated(ReLU()), "bspf"),
    "dropout": drop(Dropout),
    "dropout-inside": drop(Dropout, "bsf", "f"),
    "dropout-evaluated": drop(Dropout, train=False),
    "drop-path": drop(DropPath),
    "embedding": Case(lambda p, n: Embedding(n["v"], n["h"], p, "m", dtype="float64"), "ids"),
    "positions": positioned(),
    "positions-given": positioned(lambda n: np.arange(n["s"])[::-1] // 2),
    "positions-of-each": positioned(lambda n: np.random.default_rng(9).integers(0, n["s"] + 2, (n["b"], n["s"]))),
    "tied": Case(tied, "ids"),
    "softmax": plain(Softmax, "bsv", "v"),
    "max-pool": plain(lambda: MaxPool2d(2), "bhyx", ""),
    "max-pool-overlapping": plain(lambda: MaxPool2d((3, 4), stride=(1, 2), padding=(1, 2)), "bhyx", ""),
    "max-pool-gaps": plain(lambda: MaxPool2d(2, stride=3, padding=1), "bfyx"),
    "mean-pool": plain(lambda: AvgPool2d(2), "bhyx", ""),
    "mean-pool-overlapping": plain(lambda: AvgPool2d((3, 4), stride=(1, 2), padding=(1, 2)), "bfyx"),
    "convolution": convolution((3, 2), "inside"),
    "convolution-strides": convolution(3, "inside", stride=(2, 3), padding=(1, 2), bias=False),
    "convolution-back": convolution(3, "stream", stride=(2, 3), padding=(1, 2)),
    "convolution-points": convolution(1, "stream"),
    "convolution-gaps": convolution(2, "inside", stride=3),
    "patches": patches(),
    "patches-positions": patches(positions, class_token=True),
    "patches-first": patches(lambda p, n: FirstPool(p)),
    "patches-mean": patches(lambda p, n: MeanPool(p), class_token=True),
    "first-classes": Case(lambda p, n: ClassifierHead(n["h"], n["v"], p, "m", pool="first", dtype="float64")),
    "mean-classes": Case(lambda p, n: ClassifierHead(n["h"], n["v"], p, "m", pool="mean", dtype="float64")),
    "mlp-gelu": mlp("gelu"),
    "mlp-swiglu": mlp("swiglu", bias=False),
    "block-gpt": block(dropout=RATE),
    "block-bert": block(order="post", eps=1e-12, activation="gelu", attention={"causal": False}, dropout=RATE),
    "block-vit": block(eps=1e-6, activation="gelu", attention={"causal": False}, drop_path=RATE),
    "block-llama": block(norm="rms", activation="swiglu", bias=False, attention=LLAMA),
}


def layer_of(name, p, n=SIZES):
    """Return the layer of a case with random weights, in place of initial ones such as gains of 1 and biases of 0."""
    layer = CASES[name].make(p, n)
    for q in layer.parameters():
        q.value = random.normal(q.value.shape, p.grid, q.value.layout, 7, q.name) * 0.5
    return layer


def input_of(name, p, n=SIZES):
    case, grid = CASES[name], p.grid
    if case.letters == "ids":
        return from_global(np.random.default_rng(8).integers(0, n["v"], (n["b"], n["s"])), grid, p.tokens())
    if case.letters == "images":
        return random.normal([n[x] for x in "bcyx"], grid, Layout(*p.tokens().dims[:1], None, None, None), 3, "x")
    layout = p.inside(case.letters, case.inner) if case.inner else p.stream(case.letters)
    return random.normal([n[x] for x in case.letters], grid, layout, 3, "x")


def run(name, p, n=SIZES):
    """Return the layer, its input, dy, and by name the output, the cotangent of the input and the gradients."""
    layer, x, ctx = layer_of(name, p, n), input_of(name, p, n), CASES[name].ctx(n)
    return layer, x, *passes(layer, x, ctx)


def passes(layer, x, ctx):
    """Run forward and backward, and return dy, and by name the output, the cotangent of the input and the gradients."""
    for q in layer.parameters():
        q.grad = None
    y, cache = layer.forward(x, ctx)
    dy = random.normal(y.shape, x.grid, y.layout.with_partial(), 4, "dy")
    dx = layer.backward(dy, cache)
    return dy, {"y": y} | ({} if dx is None else {"dx": dx}) | {q.name: q.reduce() for q in layer.parameters()}


def distance(results, exact, zeros=False):
    """Return the greatest relative difference of results to whole arrays; infinity if an exact array is all zeros."""
    if set(results) != set(exact) or not (zeros or min(abs(whole).max() for whole in exact.values()) > 1e-3):
        return math.inf
    return difference({key: block_and_index(array) for key, array in results.items()}, exact)


def prepare(path, cases=None, n=SIZES):
    """Write PyTorch's results of cases by file name, for the inputs and weights of one rank."""
    import torch
    from mpi4py import MPI

    from colossal_mpi import Grid
    from tests.cases import host
    from tests.reference.torch_layers import LAYERS

    for file, name in (cases or {name: name for name in CASES}).items():
        layer, x, dy, results = run(name, Parallelism(Grid(MPI.COMM_SELF)), n)
        w = {q.name.removeprefix("m."): torch.tensor(host(q.value), requires_grad=True) for q in layer.parameters()}
        x = torch.tensor(host(x), requires_grad="dx" in results)
        y = LAYERS[name](x, w)
        y.backward(torch.tensor(host(dy)))
        exact = {"y": y.detach()} | ({"dx": x.grad} if "dx" in results else {})
        exact |= {f"m.{key}": leaf.grad for key, leaf in w.items()}
        np.savez(path / f"{file}.npz", **{key: value.numpy() for key, value in exact.items()})
