"""Training with every compatible pair of parallel modes and options takes the same steps as on one rank."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.optim import AdamW
from colossal_mpi.layers.pipeline import Pipeline, partition, stage_grid
from colossal_mpi.layers.recompute import recompute
from colossal_mpi.layout import part
from tests.reference import pairs
from tests.reference.gpt_case import block_and_index, difference

STEPS, BATCH, MICROBATCHES = 2, 7, 3
CONFIG = GPTConfig(
    vocabulary=29, layers=2, hidden=15, heads=5, positions=11, inner=23, dropout=0.1, std=0.2, dtype="float64"
)
_rng = np.random.default_rng(7)
TOKENS, LABELS = _rng.integers(0, CONFIG.vocabulary, (2, STEPS, BATCH, CONFIG.positions))
LABELS[:, 2, 3] = -1
LABELS[:, 4, 7:] = -1
LENGTHS = [[11], [3, 8], [1, 10], [5, 1, 5], [6, 5], [10, 1], [2, 2, 7]]
"""Tokens of the documents of each sample. Those of the first microbatch see one another, as by default."""
DOCUMENTS = np.array([np.repeat(np.cumsum(n) - n, n) for n in LENGTHS])
COUNT = int((LABELS[0] >= 0).sum())

CASES = pairs.chosen(least=32)
SIXTEEN = [
    pairs.Case((("pipe", 2), ("depth", 2), ("row", 2), ("col", 2)), "zero-bubble", tensor="2.5d", recompute=True),
    pairs.Case((("data", 2), ("row", 2), ("col", 2), ("depth", 2)), tensor="3d", zero=2),
]


class Feed:
    def __init__(self, p, step):
        self.p, self.step, self.microbatches, self.cross_entropy = p, step, MICROBATCHES, CrossEntropy(p)
        self.loss_backward = self.cross_entropy.backward
        self.order = p.order(CONFIG.positions)

    def _cut(self, whole, microbatch):
        rows = whole[self.step, slice(*part(BATCH, MICROBATCHES, microbatch))]
        return from_global(rows if self.order is None else rows[:, self.order], self.p.grid, self.p.tokens())

    def context(self, microbatch):
        first, stop = part(BATCH, MICROBATCHES, microbatch)
        documents = DOCUMENTS[first:stop] if microbatch else None
        return Context(self.step, first, order=self.order, documents=documents)

    def inputs(self, microbatch):
        return self._cut(TOKENS, microbatch)

    def loss(self, y, microbatch):
        return self.cross_entropy.forward(y, self._cut(LABELS, microbatch), COUNT)

    def activation_spec(self, microbatch):
        first, stop = part(BATCH, MICROBATCHES, microbatch)
        return (stop - first, CONFIG.positions, CONFIG.hidden), self.p.stream(), "float64"


def layers_of(case):
    """Return the number of blocks: enough for the chunks of a pipeline, and no multiple of its ranks."""
    pipe = dict(case.axes).get("pipe", 1)
    return {1: 2, 2: 3}.get(pipe, 7)


def train(grid, case, layers):
    """Return losses and gradient norms, the gradients of the first step and the weights after the last."""
    p = Parallelism(stage_grid(grid), case.tensor, zero=case.zero, sequence=case.sequence)
    model = GPT(replace(CONFIG, layers=layers), p)
    if case.recompute:
        recompute(model, "full")
    chunks = partition(model, grid, 2 if case.schedule == "interleaved" else 1)
    pipeline = Pipeline(chunks, grid, case.schedule)
    optimizer = AdamW(pipeline.parameters(), lr=1e-2, clip=0.5, eps=1e-3)  # the gradient of the key bias is only noise
    numbers, first = [], {}
    for step in range(STEPS):
        loss = pipeline.step(Feed(p, step))
        if not step:
            first = {q.name: block_and_index(q.reduce()) for q in optimizer.parameters}
            first = {name: (block.copy(), index) for name, (block, index) in first.items()}
        numbers.append((loss, optimizer.step()))
    return np.array(numbers), first, {q.name: block_and_index(q.value) for q in optimizer.parameters}


def prepare(path):
    for layers in {layers_of(case) for case in (*CASES, *SIXTEEN)}:
        numbers, first, weights = train(Grid(MPI.COMM_SELF), pairs.Case(()), layers)
        np.savez(path / f"gradients{layers}.npz", **{name: block for name, (block, _) in first.items()})
        weights = {name: block for name, (block, _) in weights.items()}
        np.savez(path / f"weights{layers}.npz", numbers=numbers, **weights)


def steps(cases):
    """Parametrize a test by grid and case."""
    arguments = [
        pytest.param(dict(case.axes), case, id=str(case), marks=pytest.mark.long if case in SIXTEEN else ())
        for case in cases
    ]
    return pytest.mark.parametrize(("grid", "case"), arguments, indirect=["grid"])


@pytest.mark.prepare(prepare)
@pytest.mark.every_grid
@steps([*CASES, *SIXTEEN])
def test_steps_are_those_of_one_rank(grid, case, prepared):
    layers = layers_of(case)
    numbers, first, weights = train(grid, case, layers)
    exact = dict(np.load(prepared / f"weights{layers}.npz"))
    reference = exact.pop("numbers")
    assert np.all(reference[:, 1] > 0.5), "the gradients are to be clipped"
    assert abs(numbers[0, 0] - reference[0, 0]) <= 1e-12 * reference[0, 0]
    assert difference(first, dict(np.load(prepared / f"gradients{layers}.npz"))) <= 1e-10
    assert np.allclose(numbers, reference, rtol=1e-9, atol=0)
    assert difference(weights, exact) <= 1e-9


def test_every_compatible_pair_is_there():
    names = ["pipe", "data", "ring", "ulysses", "1d", "2d", "2.5d", "3d", "zero1", "zero2", "zero3", "recompute"]
    names += ["interleaved", "zero-bubble"]
    tensors, zeros, schedules = names[4:8], names[8:11], names[12:]
    have = set().union(*[case.groups(2) for case in CASES])
    exclusive = [{*pair} for group in (tensors, zeros, schedules) for pair in itertools.combinations(group, 2)]
    for pair in itertools.combinations(sorted(names), 2):
        assert (pair in have) == ({*pair} not in exclusive), pair
    assert len({case.axes for case in CASES}) >= 30
