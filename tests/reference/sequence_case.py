"""Small models of every kind for grids that cut the sequence, in any order of the tokens, and one rank's results."""

import numpy as np
from mpi4py import MPI

from colossal_mpi import Grid, from_global
from colossal_mpi.layers import AuxiliaryLosses, Context, Parallelism
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, Bert, BertConfig, GPTConfig, Llama, LlamaConfig, ViT, ViTConfig
from tests.cases import host
from tests.reference.modes import mode_of

B, S, V, H = 4, 11, 13, 10
COMMON = {"std": 0.3, "dtype": "float64"}
SIZES = {"vocabulary": V, "layers": 2, "hidden": H, "inner": 7, **COMMON}


def experts(p):
    routed = {"experts": 3, "balance": 0.1, "z_loss": 0.1}
    return Sequential(
        Embedding(V, H, p, "tokens", **COMMON),
        TransformerBlock(H, 5, 7, p, "block", activation="swiglu", experts=routed, **COMMON),
        Linear("bsh,hv->bsv", {"h": H, "v": V}, "v", p, "head", **COMMON),
    )


def vit(pool):
    return lambda p: ViT(ViTConfig((9, 7), 2, 3, 5, 2, H, 5, 7, pool, dropout=0.2, **COMMON), p)


MODELS = {
    "gpt": lambda p: GPT(GPTConfig(**SIZES, heads=5, positions=S + 2, dropout=0.2), p),
    "gpt-positions": lambda p: GPT(GPTConfig(**SIZES, heads=5, positions=S + 2), p),
    "llama": lambda p: Llama(LlamaConfig(**SIZES, heads=6, groups=3, width=4), p),
    "llama-shared": lambda p: Llama(LlamaConfig(**SIZES, heads=4, groups=1, width=2), p),
    "llama-positions": lambda p: Llama(LlamaConfig(**SIZES, heads=4, groups=2, width=2), p),
    "llama-window": lambda p: Llama(LlamaConfig(**SIZES, heads=4, groups=2, width=2, sliding_window=3), p),
    "llama-window-positions": lambda p: Llama(LlamaConfig(**SIZES, heads=3, groups=3, width=2, sliding_window=4), p),
    "llama-documents": lambda p: Llama(LlamaConfig(**SIZES, heads=6, groups=3, width=4), p),
    "llama-window-documents": lambda p: Llama(LlamaConfig(**SIZES, heads=4, groups=1, width=2, sliding_window=3), p),
    "gpt-documents": lambda p: GPT(GPTConfig(**SIZES, heads=5, positions=S + 2), p),
    "llama-norms": lambda p: Llama(LlamaConfig(**SIZES, heads=4, groups=1, width=2, qk_norm=True), p),
    "experts": experts,
    "bert": lambda p: Bert(BertConfig(**SIZES, heads=5, positions=S + 2), p),
    "vit": vit("first"),
    "vit-mean": vit("mean"),
}
ORDERED = [name for name in MODELS if not name.startswith("vit")]
"""The models whose sequence may be in any order."""
_rng = np.random.default_rng(3)
TOKENS, LABELS, SEGMENTS = (_rng.integers(0, n, (B, S)) for n in (V, V, 2))
LABELS[1, 3] = LABELS[0, S - 1] = -1
POSITIONS = _rng.integers(0, S, (B, S))
LENGTHS = [[3, 1, 7], [11], [1, 1, 1, 8], [6, 5]]
"""Tokens of the documents that the sequences of the models named ``-documents`` hold."""
DOCUMENTS = np.array([np.repeat(np.cumsum(n) - n, n) for n in LENGTHS])
MASK = np.arange(S) < np.array([S, 4, 1, 8])[:, None]
MASK[3] = MASK[3, ::-1]
IMAGES, CLASSES, FOLLOWS = _rng.standard_normal((B, 3, 9, 7)), _rng.integers(0, 5, B), _rng.integers(0, 2, B)


def batch(name, p, rows, order):
    """Return, for some samples, the input, the labels of each output and the options of the context."""
    index = np.arange(S) if order is None else order

    def spread(whole):
        return from_global(whole[rows][:, index], p.grid, p.tokens())

    def each(whole):
        return from_global(whole[rows], p.grid, p.stream("b"))

    if name.startswith("vit"):
        return from_global(IMAGES[rows], p.grid, p.stream("bnnn")), [each(CLASSES)], {}
    known = {"order": order}
    if name == "bert":
        known |= {"mask": spread(MASK), "segments": spread(SEGMENTS)}
        return spread(TOKENS), [spread(LABELS), each(FOLLOWS)], known
    if name == "gpt-positions":
        known |= {"positions": POSITIONS[0][index], "mask": spread(MASK)}
    if name.startswith("llama") and name.endswith("positions"):
        known |= {"positions": spread(POSITIONS)}
    if name.endswith("documents"):
        known |= {"documents": DOCUMENTS[rows]}
    return spread(TOKENS), [spread(LABELS)], known


def count(labels):
    """Return how many labels of all samples count."""
    return int((LABELS >= 0).sum()) if labels.ndim == 2 else B


def run(name, p, *, order=None, microbatches=1, armed=lambda: None, change=lambda model: None):
    """Return the loss and the reduced gradients by name; `armed` is called before each backward pass.

    `change` is called with the model before the first pass.
    """
    model, cross_entropy, loss = MODELS[name](p), CrossEntropy(p), 0.0
    change(model)
    for rows in np.array_split(np.arange(B), microbatches):
        x, labels, known = batch(name, p, rows, order)
        y, cache = model.forward(x, Context(sample=int(rows[0]), auxiliary=AuxiliaryLosses(len(rows) / B), **known))
        pairs = zip(y if isinstance(y, tuple) else (y,), labels, strict=True)
        values, saved = zip(*[cross_entropy.forward(*pair, count(pair[1])) for pair in pairs], strict=True)
        dy = tuple(cross_entropy.backward(one) for one in saved)
        armed()
        model.backward(dy if isinstance(y, tuple) else dy[0], cache)
        loss += sum(values)
    return loss, {q.name: q.reduce() for q in model.parameters() if not q.frozen}


def run_apart(name, p):
    """Return what `run` returns, with every document as a sequence of its own."""
    model, cross_entropy, loss = MODELS[name](p), CrossEntropy(p), 0.0
    for row, lengths in enumerate(LENGTHS):
        for tokens, labels in zip(*(np.split(x[row], np.cumsum(lengths)[:-1]) for x in (TOKENS, LABELS)), strict=True):
            x, t = (from_global(one[None], p.grid, p.tokens()) for one in (tokens, labels))
            y, cache = model.forward(x, Context())
            value, saved = cross_entropy.forward(y, t, count(LABELS))
            model.backward(cross_entropy.backward(saved), cache)
            loss += value
    return loss, {q.name: q.reduce() for q in model.parameters()}


def parallelism(grid, **options):
    return Parallelism(grid, mode_of(grid), **options)


def prepare(path):
    """Write loss and gradients of each model on one rank, with documents as sequences of their own."""
    for name in MODELS:
        alone = run_apart if name.endswith("documents") else run
        loss, gradients = alone(name, Parallelism(Grid(MPI.COMM_SELF)))
        np.savez(path / f"{name}.npz", loss=loss, **{key: host(g) for key, g in gradients.items()})
