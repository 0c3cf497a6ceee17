"""Float32 gradients are as close to the float64 gradients as PyTorch's, and within the bound of their roundings.

The measure is ``||g - exact|| / ||exact||`` of each parameter, in the Frobenius norm. PyTorch computes the exact
gradient in float64 from the same float32 weights.
"""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from tests.cases import host

CONFIG = GPTConfig(vocabulary=257, layers=4, hidden=120, heads=5, positions=61, dtype="float32")
BATCH = 5
_rng = np.random.default_rng(7)
TOKENS = _rng.integers(0, CONFIG.vocabulary, (BATCH, CONFIG.positions))
LABELS = _rng.integers(0, CONFIG.vocabulary, (BATCH, CONFIG.positions))


def gradients(grid):
    """Return the weights and the gradients by name."""
    p = Parallelism(grid)
    model, loss = GPT(CONFIG, p), CrossEntropy(p)
    ids, labels = (from_global(a, grid, p.tokens()) for a in (TOKENS, LABELS))
    logits, cache = model.forward(ids, Context())
    model.backward(loss.backward(loss.forward(logits, labels, LABELS.size)[1]), cache)
    return [{p.name: host(of(p)) for p in model.parameters()} for of in (value, gradient)]


def value(parameter):
    return parameter.value


def gradient(parameter):
    return parameter.grad


def prepare(path):
    """Write the exact gradients of the weights, and PyTorch's in float32."""
    from tests.reference.torch_gpt import loss_and_gradients

    weights, _ = gradients(Grid(MPI.COMM_SELF))
    for dtype in ("float32", "float64"):
        _, of = loss_and_gradients(weights, TOKENS, LABELS, CONFIG.heads, dtype)
        np.savez(path / f"{dtype}.npz", **of)


def distances(of, exact):
    return {name: np.linalg.norm(of[name] - exact[name]) / np.linalg.norm(exact[name]) for name in exact}


@pytest.mark.prepare(prepare)
def test_float32_gradients_are_as_near_to_the_truth_as_those_of_pytorch(prepared):
    exact, peer = (dict(np.load(prepared / f"{dtype}.npz")) for dtype in ("float64", "float32"))
    weights, mine = gradients(Grid(MPI.COMM_SELF))
    assert {name: g.dtype for name, g in mine.items()} == {name: np.dtype("float32") for name in weights}
    ours, theirs = distances(mine, exact), distances(peer, exact)
    assert set(ours) == set(weights)
    assert {name: (far, theirs[name]) for name, far in ours.items() if far > 2 * theirs[name]} == {}
    # A gradient is a sum of up to k terms, whose roundings add up like a random walk.
    k = max(BATCH * CONFIG.positions, 4 * CONFIG.hidden)
    assert max(ours.values()) <= k**0.5 * np.finfo("float32").eps
