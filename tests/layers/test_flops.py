"""The counted flop of a training step equal the products that one rank does, and PaLM's formula."""

import importlib
import math

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import OptionError
from colossal_mpi.layers import Layer, Parallelism, Residual
from colossal_mpi.layers.analysis import flops
from colossal_mpi.layers.conv import Conv2d
from colossal_mpi.layers.models import Llama, LlamaConfig
from colossal_mpi.platform import backend, blas

WIDE = {"layers": 2, "hidden": 20, "heads": 4}
SIZES = {"vocabulary": 13, "layers": 1, "hidden": 20, "heads": 10, "groups": 2, "inner": 7}
MODELS = {
    "gpt": {**WIDE, "context": 150},
    "llama": {"kind": "llama", **WIDE, "heads": 10, "groups": 5, "inner": 7, "context": 70},
    "llama-window": {
        "kind": "llama",
        **WIDE,
        "heads": 10,
        "groups": 2,
        "inner": 7,
        "context": 530,
        "sliding_window": 20,
    },
    "bert": {"kind": "bert", **WIDE, "context": 67},
    "bert-pairs": {"kind": "bert", **WIDE, "context": 13, "next_sentence": True},
    "vit": {"kind": "vit", **WIDE, "patch": 3},
    "vit-mean": {"kind": "vit", **WIDE, "patch": 3, "pool": "mean"},
}


def trainer(name, grid, recompute="none"):
    parallel = {"kernels": "reference", "dtype": "float64", "recompute": recompute}
    table = {"model": MODELS[name], "training": {"batch": 5, "microbatches": 2}, "parallel": parallel}
    return Trainer(configs.validate(table, name), grid)


class Counting:
    """An array namespace that counts its matrix products, except products with a row of ones, which are sums."""

    def __init__(self, xp, done):
        self.xp, self.done = xp, done

    def __getattr__(self, name):
        return getattr(self.xp, name)

    def matmul(self, a, b):
        c = self.xp.matmul(a, b)
        if a.shape[-2] > 1 or np.any(a != 1):
            self.done.append(2 * c.size * a.shape[-1])
        return c


@pytest.fixture
def counted(monkeypatch):
    """Return the list that gets the flop of every product of blocks, by BLAS or not, and of attention."""
    done, cblas = [], blas._cblas
    xp = Counting(backend._NUMPY, done)

    def gemm(a, b, c, *rest):
        fits = cblas(a, b, c, *rest)
        done.append(2 * c.size * a.shape[1] if fits else 0)
        return fits

    monkeypatch.setattr(blas, "_cblas", gemm)
    monkeypatch.setattr(blas, "product", lambda a, b, *_: xp.matmul(a, b))
    attention = importlib.import_module("colossal_mpi.layers.kernels.reference.attention")
    monkeypatch.setattr(attention, "namespace", lambda *_: xp)
    return done


@pytest.mark.parametrize(
    ("name", "again"),
    [*((name, "none") for name in MODELS), ("gpt", "full"), ("llama", "full"), ("bert", "full"), ("gpt", "selective")],
)
def test_hardware_flop_are_those_of_the_products_of_a_step(name, again, counted):
    run = trainer(name, Grid(MPI.COMM_SELF), again)
    counted.clear()
    run.gradients(0)
    assert sum(counted) == flops.hardware_flop(run.model, 5, run.task.length)


@pytest.mark.parametrize(("name", "tied"), [("gpt", True), ("llama", False)])
def test_model_flop_are_those_of_palm(name, tied):
    """A token takes 6 N + 12 L s a d; N leaves out norms, biases, positions and a table that is only looked up."""
    run = trainer(name, Grid(MPI.COMM_SELF))
    multiplied = [p for p in run.model.parameters() if p.name.endswith(".weight") and len(p.shape) > 1]
    looked_up = {"positions.weight"} if tied else {"tokens.weight"}
    n = sum(math.prod(p.shape) for p in multiplied if p.name not in looked_up)
    s, sizes = run.task.length, MODELS[name]
    token = 6 * n + 12 * sizes["layers"] * s * sizes["hidden"]
    assert flops.model_flop(run.model, 5, s) == 5 * s * token
    assert flops.hardware_flop(run.model, 5, s) != flops.model_flop(run.model, 5, s)
    again = trainer(name, Grid(MPI.COMM_SELF), "full").model
    assert flops.model_flop(again, 5, s) == flops.model_flop(run.model, 5, s)
    assert flops.hardware_flop(again, 5, s) > flops.hardware_flop(run.model, 5, s)


def test_a_window_takes_the_place_of_the_length_in_the_scores():
    sizes = MODELS["llama-window"]
    models = [Llama(LlamaConfig(**SIZES, sliding_window=w), Parallelism(Grid(MPI.COMM_SELF))) for w in (None, 20, 900)]
    every, some, covered = (flops.model_flop(model, 5, sizes["context"]) for model in models)
    assert covered == every == some + 5 * sizes["context"] * 12 * (sizes["context"] - 20) * SIZES["hidden"]
    assert flops.hardware_flop(models[1], 5, 530) < flops.hardware_flop(models[0], 5, 530)


def test_the_windows_of_an_image_are_no_positions():
    layer = Conv2d(3, 4, 2, Parallelism(Grid(MPI.COMM_SELF)), "conv")
    with pytest.raises(OptionError, match="conv: the flop of a convolution are known for the patches"):
        flops.model_flop(layer, 2, 9)


class Outer(Layer):
    """A user's layer without parts."""

    def __init__(self, width):
        self.width, self.name = width, "outer"


def test_a_layer_without_parts_needs_a_rule():
    model = Residual(Outer(5))
    with pytest.raises(OptionError, match=r"outer: there is no rule for the flop of Outer: register one"):
        flops.model_flop(model, 2, 9)
    flops.flop_of.register(Outer, lambda layer, shape, hardware: flops.Flop(shape.samples * shape.length * layer.width))
    assert flops.model_flop(model, 2, 9) == 3 * 2 * 9 * 5


def test_every_layer_without_parts_has_a_rule_or_belongs_to_one_that_has():
    """A leaf is a class that takes no layer; the rules are looked up as `flop_of` does."""
    within = {"Attention", "GroupedAttention", "Outer"}  # SelfAttention counts the first two

    def kinds(base):
        for kind in base.__subclasses__():
            yield kind
            yield from kinds(kind)

    rules = {kind for kind in kinds(Layer) if flops.flop_of.dispatch(kind) is not flops.flop_of.dispatch(Layer)}
    holders = {"FanOut", "Gated", "LayerModule", "Linears", "Parallel", "SequenceFirst"}
    lacking = {kind.__name__ for kind in kinds(Layer) if kind.__module__.startswith("colossal_mpi")} - within
    assert lacking - {kind.__name__ for kind in rules} <= holders
