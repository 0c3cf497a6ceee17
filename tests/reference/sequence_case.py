"""Small models of every kind for grids that cut the sequence, in any order of it, and their one-rank reference."""

import numpy as np
from mpi4py import MPI

from colossal_mpi import Grid, from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, Bert, BertConfig, GPTConfig, Llama, LlamaConfig, ViT, ViTConfig
from reference.modes import mode_of
from tests.cases import host

B, S, V = 4, 11, 13
COMMON = {"vocabulary": V, "layers": 2, "hidden": 10, "std": 0.3, "dtype": "float64"}
MODELS = {
    "gpt": (GPT, GPTConfig(**COMMON, heads=5, positions=S + 2, inner=7)),
    "llama": (Llama, LlamaConfig(**COMMON, heads=6, groups=3, width=4, inner=7)),
    "llama-shared": (Llama, LlamaConfig(**COMMON, heads=4, groups=1, width=2, inner=7)),
    "bert": (Bert, BertConfig(**COMMON, heads=5, positions=S + 2, inner=7)),
    "vit": (ViT, ViTConfig((9, 7), 2, 3, 5, 2, 10, 5, 7, std=0.3, dtype="float64")),
    "vit-mean": (ViT, ViTConfig((9, 7), 2, 3, 5, 2, 10, 5, 7, "mean", std=0.3, dtype="float64")),
}
_rng = np.random.default_rng(3)
TOKENS, LABELS, SEGMENTS = (_rng.integers(0, n, (B, S)) for n in (V, V, 2))
LABELS[1, 3] = LABELS[0, S - 1] = -1
MASK = np.arange(S) < np.array([S, 4, 1, 8])[:, None]
MASK[3] = MASK[3, ::-1]
IMAGES, CLASSES, FOLLOWS = _rng.standard_normal((B, 3, 9, 7)), _rng.integers(0, 5, B), _rng.integers(0, 2, B)


def batch(name, p, rows, order):
    """Return input, labels of each output and what the context has of some samples."""

    def spread(whole):
        return from_global(whole[rows] if order is None else whole[rows][:, order], p.grid, p.tokens())

    def each(whole):
        return from_global(whole[rows], p.grid, p.stream("b"))

    if name.startswith("vit"):
        return from_global(IMAGES[rows], p.grid, p.stream("b" + "nnn")), [each(CLASSES)], {}
    if name == "bert":
        known = {"mask": spread(MASK), "segments": spread(SEGMENTS)}
        return spread(TOKENS), [spread(LABELS), each(FOLLOWS)], known
    return spread(TOKENS), [spread(LABELS)], {"order": order}


def count(labels):
    """Return how many labels of all samples count."""
    return int((LABELS >= 0).sum()) if labels.ndim == 2 else B


def run(name, p, *, zigzag=False, microbatches=1, positions=None):
    """Return the loss and the reduced gradients by name."""
    kind, config = MODELS[name]
    model, cross_entropy, loss = kind(config, p), CrossEntropy(p), 0.0
    order = p.order(S) if zigzag else None
    for rows in np.array_split(np.arange(B), microbatches):
        x, labels, known = batch(name, p, rows, order)
        y, cache = model.forward(x, Context(sample=int(rows[0]), positions=positions, **known))
        pairs = zip(y if isinstance(y, tuple) else (y,), labels, strict=True)
        values, saved = zip(*[cross_entropy.forward(*pair, count(pair[1])) for pair in pairs], strict=True)
        dy = tuple(cross_entropy.backward(one) for one in saved)
        model.backward(dy if isinstance(y, tuple) else dy[0], cache)
        loss += sum(values)
    return loss, {q.name: q.reduce() for q in model.parameters()}


def parallelism(grid, **options):
    return Parallelism(grid, mode_of(grid), **options)


def prepare(path):
    """Write loss and gradients of each model on one rank."""
    for name in MODELS:
        loss, gradients = run(name, Parallelism(Grid(MPI.COMM_SELF)))
        np.savez(path / f"{name}.npz", loss=loss, **{key: host(g) for key, g in gradients.items()})
