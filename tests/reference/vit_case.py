"""A ViT with sizes that do not divide, its images, and PyTorch's loss and gradients for the same weights."""

import numpy as np

from colossal_mpi import Layout, from_global, random
from colossal_mpi.layers import Context
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import ViT, ViTConfig

RATE, STEP, BATCH, PARTS = 0.3, 2, 5, [2, 3]
SIZES = {
    "image": (9, 7),
    "patch": (2, 3),
    "channels": 3,
    "classes": 7,
    "layers": 3,
    "hidden": 15,
    "heads": 3,
    "inner": 7,
    "dtype": "float64",
}
CASES = {
    "first": ViTConfig(**SIZES),
    "first-dropped": ViTConfig(**SIZES, dropout=RATE, drop_path=RATE),
    "mean": ViTConfig(**SIZES, pool="mean", eps=1e-3),
}
_rng = np.random.default_rng(4)
IMAGES, LABELS = _rng.standard_normal((BATCH, 3, 9, 7)), _rng.integers(0, 7, BATCH)


def run(name, p):
    """Return loss, logits and gradients by name, for two microbatches, and the model."""
    model, loss_layer, loss, first = ViT(CASES[name], p), CrossEntropy(p), 0.0, 0
    for q in model.parameters():  # no gain of 1 and no bias of 0, and outputs that differ
        q.value = random.normal(q.value.shape, p.grid, q.value.layout, 7, q.name) * 0.5
    results = {}
    for i, count in enumerate(PARTS):
        rows = slice(first, first + count)
        x = from_global(IMAGES[rows], p.grid, Layout(p.tokens().dims[0], None, None, None))
        labels = from_global(LABELS[rows], p.grid, Layout(None))
        logits, cache = model.forward(x, Context(step=STEP, sample=first))
        value, saved = loss_layer.forward(logits, labels, BATCH)
        dx = model.backward(loss_layer.backward(saved), cache)
        results |= {f"y{i}": logits, f"dx{i}": dx}
        loss, first = loss + value, first + count
    return loss, results | {q.name: q.reduce() for q in model.parameters()}, model


def prepare(path):
    """Write PyTorch's results of every case, for the weights of one rank."""
    import torch
    from mpi4py import MPI

    from colossal_mpi import Grid
    from colossal_mpi.layers import Parallelism
    from tests.cases import host
    from tests.reference.torch_vit import logits

    for name, config in CASES.items():
        _, _, model = run(name, Parallelism(Grid(MPI.COMM_SELF)))
        w = {q.name: torch.tensor(host(q.value), requires_grad=True) for q in model.parameters()}
        x = torch.tensor(IMAGES, requires_grad=True)
        y = logits(x, w, config, STEP)
        loss = torch.nn.functional.cross_entropy(y, torch.tensor(LABELS))
        loss.backward()
        exact = {f"y{i}": part.detach() for i, part in enumerate(y.split(PARTS))}
        exact |= {f"dx{i}": part for i, part in enumerate(x.grad.split(PARTS))} | {k: v.grad for k, v in w.items()}
        np.savez(path / f"{name}.npz", loss=loss.item(), **{key: value.numpy() for key, value in exact.items()})
