"""ZeRO stores optimizer state, gradients and weights once among the ranks of ``data`` and takes one rank's steps."""

import numpy as np
import pytest

from colossal_mpi import Grid, OptionError, comm, from_global, ledger, random
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.optim import AdamW, Muon
from tests.cases import host
from tests.reference import gpt_case as case
from tests.reference.modes import mode_of

STEPS, MICROBATCHES = 2, 2
GRIDS = (
    {"data": 3},
    {"data": 2, "col": 2},
    {"data": 3, "row": 2},
    {"data": 2, "depth": 2, "row": 1, "col": 2},
    {"data": 2, "row": 2, "col": 1, "depth": 2},
)
each_stage = pytest.mark.parametrize("zero", [1, 2, 3])


def train(p):
    """Return losses and gradient norms of some clipped steps, the first gradients and the model after them."""
    model, loss = GPT(case.CONFIG, p), CrossEntropy(p)
    optimizer = Muon(
        model.parameters(), lr=1e-2, clip=0.5, eps=1e-3
    )  # eps: see the noise of the key bias in test_optim
    numbers, first = [], None
    for step in range(STEPS):
        total = 0.0
        for rows in np.array_split(np.arange(case.BATCH), MICROBATCHES):
            ids, labels = (from_global(a[rows], p.grid, p.tokens()) for a in (case.TOKENS, case.LABELS))
            logits, cache = model.forward(ids, Context(step))
            value, saved = loss.forward(logits, labels, case.COUNT)
            model.backward(loss.backward(saved), cache)
            total += value
        if first is None:
            first = {q.name: q.reduce() for q in model.parameters()}
            first = {name: case.block_and_index(g.copy()) for name, g in first.items()}
        numbers.append((total, optimizer.step()))
    return numbers, first, model


def prepare(path):
    from mpi4py import MPI

    numbers, first, model = train(Parallelism(Grid(MPI.COMM_SELF)))
    np.savez(path / "gradients.npz", **{name: block for name, (block, _) in first.items()})
    np.savez(path / "weights.npz", numbers=numbers, **{q.name: host(q.value) for q in model.parameters()})


@pytest.mark.prepare(prepare)
@each_stage
@pytest.mark.grids(*GRIDS)
def test_steps_equal_one_rank(grid, prepared, zero):
    numbers, first, model = train(Parallelism(grid, mode_of(grid), zero=zero))
    exact = dict(np.load(prepared / "weights.npz"))
    assert np.allclose(numbers, exact.pop("numbers"), rtol=1e-10, atol=0)
    assert case.difference(first, dict(np.load(prepared / "gradients.npz"))) <= 1e-10
    assert case.difference({q.name: case.block_and_index(q.value) for q in model.parameters()}, exact) <= 1e-9


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.grids({"data": 2}, {"data": 3})
def test_words_of_a_step(grid, zero):
    """Words are summed over d ranks, for M elements of matrices and v of vectors; vectors are gathered only once."""
    p, d = Parallelism(grid, zero=zero), grid.size
    block = TransformerBlock(10, 5, 13, p, "block", dtype="float64")
    sizes = [(q.value.size, q.value.ndim > 1 and q.name.endswith("weight")) for q in block.parameters()]
    matrices, vectors = (sum(n for n, is_matrix in sizes if is_matrix is kind) for kind in (True, False))
    optimizer = AdamW(block.parameters(), clip=None)
    x = random.normal((6, 5, 10), grid, p.stream(), 0, "x")
    with ledger.record() as moved:
        for _ in range(MICROBATCHES):
            y, cache = block.forward(x, Context())
            block.backward(y, cache)
        optimizer.step()
    words = sum(comm.collect(moved.words, grid)) - 2 * (d - 1)  # the norm
    once = matrices + vectors
    expected = {0: 2 * once, 1: 2 * once, 2: (MICROBATCHES + 1) * once, 3: MICROBATCHES * (3 * matrices + 2 * vectors)}
    assert words == (d - 1) * expected[zero]


@pytest.mark.grids({"data": 4}, {"data": 2, "row": 2, "col": 2})
def test_memory_falls_with_the_ranks(grid):
    def held(zero):
        p = Parallelism(grid, mode_of(grid), zero=zero)
        block = TransformerBlock(64, 4, 256, p, "block")
        optimizer = AdamW(block.parameters())
        x = random.normal((grid.axes["data"] * 2, 4, 64), grid, p.stream(), 0, "x").astype("float32")
        y, cache = block.forward(x, Context())
        block.backward(y, cache)
        parts = {"weights": [q.value for q in block.parameters()], "gradients": [q.grad for q in block.parameters()]}
        parts["state"] = list(optimizer.state().values())
        return {name: sum(array.local.size for array in arrays) for name, arrays in parts.items()}

    whole, d = held(0), grid.axes["data"]
    cut = {1: {"state"}, 2: {"state", "gradients"}, 3: {"state", "gradients", "weights"}}
    for zero, names in cut.items():
        for name, size in held(zero).items():
            expected = whole[name] / d if name in names else whole[name]
            assert abs(size - expected) <= 0.05 * expected, (zero, name)


@pytest.mark.grids({"data": 2, "col": 2})
def test_each_element_is_stepped_by_one_rank_of_data(grid):
    p = Parallelism(grid, "1d", zero=1)
    for q in GPT(case.CONFIG, p).parameters():
        assert "data" in q.owned.cut
        assert q.owned.with_partial() == q.owned
        assert np.shares_memory(q.share().local, q.value.local) or not q.share().local.size


def test_no_such_stage():
    from mpi4py import MPI

    with pytest.raises(OptionError, match="zero=4: use 0, 1, 2 or 3"):
        Parallelism(Grid(MPI.COMM_SELF), zero=4)
