"""If any one reduction of a model or a layer is left out, the comparison with one rank fails."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, comm, from_global, random
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from tests.cases import host
from tests.reference import gpt_case as case
from tests.reference import layer_case
from tests.reference.modes import mode_of, parallelism
from tests.reference.saboteur import Saboteur

CONFIG = GPTConfig(vocabulary=257, layers=1, hidden=10, heads=5, positions=7, dtype="float64")
TOKENS = np.random.default_rng(0).integers(
    0, 257, (5, 7)
)  # 6 inputs: a rank does not hold the rows of the position table that it uses


def gradients(grid, tensor, saboteur=None, victim=None):
    """Return the whole gradients, with one reduction of the backward pass sabotaged."""
    p = Parallelism(grid, tensor)
    model, loss = GPT(CONFIG, p), CrossEntropy(p)
    ids, labels = (from_global(a, grid, p.tokens()) for a in (TOKENS[:, :-1], TOKENS[:, 1:]))
    logits, cache = model.forward(ids, Context())
    _, saved = loss.forward(logits, labels, 30)
    if saboteur:
        saboteur.arm(victim)
    model.backward(loss.backward(saved), cache)
    reduced = [parameter.reduce() for parameter in model.parameters()]
    if saboteur:
        saboteur.armed = False
    return {p.name: g.gather() for p, g in zip(model.parameters(), reduced, strict=True)}


def difference(mine, exact):
    return case.difference({name: (g, ...) for name, g in mine.items()}, exact)


def attention_gradients(grid, tensor, saboteur=None, victim=None):
    """Return the gradients of attention whose keys and values are on all ranks."""
    p = Parallelism(grid, tensor)
    options = {"groups": 1, "width": 2, "rotary": Rotary(), "std": 0.5, "out_std": 0.5, "dtype": "float64"}
    layer = SelfAttention(10, 6, p, "attention", **options)
    x, dy = (random.normal((5, 7, 10), grid, p.stream(), 0, name) for name in ("x", "dy"))
    _, cache = layer.forward(x, Context())
    if saboteur:
        saboteur.arm(victim)
    dx = layer.backward(dy, cache)
    reduced = {q.name: q.reduce() for q in layer.parameters()}
    if saboteur:
        saboteur.armed = False
    return {name: g.gather() for name, g in {"dx": dx, **reduced}.items()}


def check(grid, tensor, monkeypatch, gradients=gradients):
    exact = gradients(Grid(MPI.COMM_SELF), None)
    saboteur = Saboteur(monkeypatch)
    assert difference(gradients(grid, tensor, saboteur), exact) <= 1e-10
    reductions = saboteur.log
    assert {axis for _, axes in reductions for axis in axes} == set(grid.axes)
    for victim, reduction in enumerate(reductions):
        wrong = gradients(grid, tensor, saboteur, victim)
        seen = max(comm.collect(difference(wrong, exact), grid))
        assert seen > 1e-10, f"reduction {victim} of the backward pass, {reduction}, is not missed"


@pytest.mark.grids({"col": 2}, {"data": 2, "col": 2}, {"seq": 2, "ulysses": 2})
def test_1d(grid, monkeypatch):
    check(grid, "1d", monkeypatch)


@pytest.mark.grids({"row": 2, "col": 2}, {"data": 2, "row": 2})
def test_2d(grid, monkeypatch):
    check(grid, "2d", monkeypatch)


@pytest.mark.grids({"depth": 2, "row": 2}, {"depth": 2, "col": 2})
def test_25d(grid, monkeypatch):
    check(grid, "2.5d", monkeypatch)


@pytest.mark.deadline(120)
@pytest.mark.grids({"row": 2, "depth": 2}, {"row": 2, "col": 2, "depth": 2})
def test_3d(grid, monkeypatch):
    check(grid, "3d", monkeypatch)


@pytest.mark.grids({"col": 2}, {"row": 2, "col": 2}, {"depth": 2, "col": 2}, {"col": 2, "depth": 2}, {"ulysses": 2})
def test_keys_and_values_of_every_rank(grid, monkeypatch):
    check(grid, mode_of(grid), monkeypatch, attention_gradients)


SUMMED = (
    *("up", "down", "layer-norm", "rms-norm", "softmax", "embedding", "positions", "tied", "first-classes"),
    *("mean-classes", "convolution", "convolution-back", "patches-positions", "patches-mean"),
)


@pytest.mark.grids(
    {"col": 2}, {"row": 2, "col": 2}, {"depth": 2, "col": 2}, {"row": 2, "depth": 2}, {"data": 2, "col": 2}
)
def test_layers(grid, monkeypatch):
    p, alone, saboteur, missed = parallelism(grid), Parallelism(Grid(MPI.COMM_SELF)), Saboteur(monkeypatch), []

    def off(name, exact, victim=None):
        saboteur.arm(victim)
        results = layer_case.run(name, p)[-1]
        saboteur.armed = False
        return max(comm.collect(layer_case.distance(results, exact), grid))

    for name in SUMMED:
        exact = {key: host(array) for key, array in layer_case.run(name, alone)[-1].items()}
        assert off(name, exact) <= 1e-10
        sums = saboteur.log
        missed += [(name, which) for victim, which in enumerate(sums) if not off(name, exact, victim) > 1e-10]
    assert not missed
