"""The GPT of the exactness tests, whose sizes do not divide, its data and its one-rank reference."""

import numpy as np
from mpi4py import MPI

from colossal_mpi import Grid, from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from tests.cases import host

CONFIG = GPTConfig(vocabulary=257, layers=3, hidden=40, heads=5, positions=19, dtype="float64")
BATCH = 7

_rng = np.random.default_rng(1)
TOKENS = _rng.integers(0, CONFIG.vocabulary, (BATCH, CONFIG.positions))
LABELS = _rng.integers(0, CONFIG.vocabulary, (BATCH, CONFIG.positions))
LABELS[2, 3] = -1
COUNT = int((LABELS >= 0).sum())


def run(grid, tensor, keep_gathered=True, microbatches=1):
    """Return the loss and the model with its gradients reduced."""
    p = Parallelism(grid, tensor, keep_gathered)
    model, loss_layer, loss = GPT(CONFIG, p), CrossEntropy(p), 0.0
    for rows in np.array_split(np.arange(BATCH), microbatches):
        ids, labels = (from_global(a[rows], grid, p.tokens()) for a in (TOKENS, LABELS))
        logits, cache = model.forward(ids, Context())
        value, saved = loss_layer.forward(logits, labels, COUNT)
        model.backward(loss_layer.backward(saved), cache)
        loss += value
    for parameter in model.parameters():
        parameter.reduce()
    return loss, model


def prepare(path):
    """Write loss, weights and gradients of one rank, and PyTorch's loss and gradients for the same weights."""
    from tests.reference.torch_gpt import loss_and_gradients

    loss, model = run(Grid(MPI.COMM_SELF), None)
    weights = {p.name: host(p.value) for p in model.parameters()}
    exact_loss, exact = loss_and_gradients(weights, TOKENS, LABELS, CONFIG.heads)
    np.savez(path / "weights.npz", **weights)
    np.savez(path / "gradients.npz", loss=loss, **{p.name: host(p.grad) for p in model.parameters()})
    np.savez(path / "torch.npz", loss=exact_loss, **exact)


def difference(mine, exact):
    """Return the greatest relative difference of blocks of gradients ``{name: (block, index)}`` to whole arrays.

    It is relative to a parameter's greatest gradient, or to 1e-3 of the model's if that is larger, because some exact
    gradients are zero (the key bias).
    """
    floor = 1e-3 * max(abs(exact[name]).max() for name in mine)
    return max(
        np.max(abs(block - exact[name][index]), initial=0) / max(abs(exact[name]).max(), floor)
        for name, (block, index) in mine.items()
    )


def block_and_index(array):
    """Return this rank's block of a DistArray and its index in the global array."""
    box = array.layout.box(array.shape, array.grid.axes, array.grid.coords)
    return host(array), tuple(slice(a, b) for a, b in box)
