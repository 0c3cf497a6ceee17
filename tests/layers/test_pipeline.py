"""A model cut along pipe has the loss and gradients of the whole model, with every schedule and in every mode."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, GridError, comm, from_global, ledger
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.optim import AdamW
from colossal_mpi.layers.pipeline import Pipeline, partition, stage_grid
from colossal_mpi.layers.pipeline.partition import balanced_ranges
from colossal_mpi.layout import part
from tests.cases import host
from tests.reference import gpt_case as gpt
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.gpt_feed import GPTFeed
from tests.reference.modes import mode_of

B, S, H, V, BLOCKS = 7, 5, 10, 13, 7
COMMON = {"dtype": "float64"}
_rng = np.random.default_rng(4)
TOKENS, LABELS = _rng.integers(0, V, (2, B, S))
LABELS[3, 2] = -1
COUNT = int((LABELS >= 0).sum())
COSTS = [1.0, 0.5, *[4.0] * BLOCKS, 0.5, 2.0]


def layers(p):
    """Return the functions that make the layers of a small transformer."""
    return [
        lambda: Embedding(V, H, p, "tokens", **COMMON),
        lambda: PositionEmbedding(S, H, p, "positions", **COMMON),
        *[lambda i=i: TransformerBlock(H, 5, 11, p, f"blocks.{i}", std=0.3, **COMMON) for i in range(BLOCKS)],
        lambda: LayerNorm(H, p, "norm", **COMMON),
        lambda: Linear("bsh,hv->bsv", {"h": H, "v": V}, "v", p, "head", std=0.3, **COMMON),
    ]


class Feed:
    def __init__(self, p, microbatches):
        self.p, self.microbatches, self.cross_entropy = p, microbatches, CrossEntropy(p)
        self.loss_backward = self.cross_entropy.backward

    def _cut(self, whole, microbatch):
        return from_global(whole[slice(*part(B, self.microbatches, microbatch))], self.p.grid, self.p.tokens())

    def context(self, microbatch):
        return Context()

    def inputs(self, microbatch):
        return self._cut(TOKENS, microbatch)

    def loss(self, y, microbatch):
        return self.cross_entropy.forward(y, self._cut(LABELS, microbatch), COUNT)

    def activation_spec(self, microbatch):
        first, stop = part(B, self.microbatches, microbatch)
        return (stop - first, S, H), self.p.stream(), "float64"


def prepare(path):
    grid = Grid(MPI.COMM_SELF)
    p = Parallelism(grid)
    model, feed = Sequential(*[make() for make in layers(p)]), Feed(p, 1)
    y, cache = model.forward(feed.inputs(0), Context())
    loss, saved = feed.loss(y, 0)
    model.backward(feed.loss_backward(saved), cache)
    np.savez(path / "whole.npz", loss=loss, **{q.name: host(q.reduce()) for q in model.parameters()})


def pieces(grid, chunks, mode=None):
    p = Parallelism(grid.at(pipe=grid.coords["pipe"]), mode or mode_of(grid.at(pipe=grid.coords["pipe"])))
    made, stages = layers(p), grid.axes["pipe"]
    pieces = balanced_ranges(COSTS, stages * chunks)
    mine = [pieces[c * stages + grid.coords["pipe"]] for c in range(chunks)]
    return p, [Sequential(*[made[i]() for i in piece]) for piece in mine]


def check(grid, prepared, schedule, microbatches):
    exact = dict(np.load(prepared / "whole.npz"))
    chunks = 2 if schedule == "interleaved" else 1
    p, mine = pieces(grid, chunks)
    loss = Pipeline(mine, grid, schedule).step(Feed(p, microbatches))
    reference = float(exact.pop("loss"))
    assert abs(loss - reference) <= 1e-12 * reference
    gradients = {q.name: block_and_index(q.reduce()) for piece in mine for q in piece.parameters()}
    assert set().union(*comm.collect(set(gradients), grid)) == set(exact)
    assert difference(gradients, exact) <= 1e-10


prepared_by = pytest.mark.prepare(prepare)
each = pytest.mark.parametrize(
    ("schedule", "microbatches"), [("gpipe", 3), ("1f1b", 5), ("interleaved", 4), ("zero-bubble", 7), ("1f1b", 1)]
)


@prepared_by
@each
@pytest.mark.grids({"pipe": 1}, {"pipe": 2}, {"pipe": 3}, {"pipe": 4}, {"pipe": 5})
def test_every_schedule_on_every_number_of_stages(grid, prepared, schedule, microbatches):
    check(grid, prepared, schedule, microbatches)


@prepared_by
@each
@pytest.mark.grids(
    {"pipe": 2, "data": 2},
    {"pipe": 2, "col": 3},
    {"pipe": 2, "seq": 3},
    {"pipe": 2, "row": 2, "col": 2},
    {"pipe": 2, "data": 2, "depth": 2},
    {"pipe": 2, "depth": 2, "row": 1, "col": 2},
    {"pipe": 2, "row": 2, "col": 1, "depth": 2},
    {"pipe": 4, "data": 2},
)
def test_every_schedule_in_every_mode(grid, prepared, schedule, microbatches):
    check(grid, prepared, schedule, microbatches)


@prepared_by
@each
@pytest.mark.grids({"pipe": 2}, {"pipe": 2, "row": 2, "col": 2})
def test_words_between_stages(grid, prepared, schedule, microbatches):
    p, mine = pieces(grid, chunks := 2 if schedule == "interleaved" else 1)
    with ledger.record() as moved:
        Pipeline(mine, grid, schedule).step(Feed(p, microbatches))
    words = sum(event.words for event in moved.events if event.axes == ("pipe",))
    total = sum(comm.collect(words, grid))
    assert total == 2 * (2 * chunks - 1) * B * S * H + grid.size // 2  # and the loss


@pytest.mark.prepare(gpt.prepare)
@pytest.mark.parametrize(("schedule", "zero"), [("1f1b", 0), ("zero-bubble", 1), ("interleaved", 2), ("gpipe", 3)])
@pytest.mark.grids(
    {"pipe": 3},
    {"pipe": 4},
    {"pipe": 2, "data": 2},
    {"pipe": 2, "data": 3},
    {"pipe": 2, "row": 2, "col": 2},
    {"pipe": 2, "data": 2, "depth": 2},
)
def test_tied_weights_on_both_ends(grid, prepared, schedule, zero):
    exact = dict(np.load(prepared / "gradients.npz"))
    reference = float(exact.pop("loss"))
    place = grid.at(pipe=grid.coords["pipe"])
    p = Parallelism(place, mode_of(place), zero=zero)
    pipeline = Pipeline(partition(GPT(gpt.CONFIG, p), grid, 2 if schedule == "interleaved" else 1), grid, schedule)
    optimizer = AdamW(pipeline.parameters(), clip=0.5)
    loss = pipeline.step(GPTFeed(p, 3))
    assert abs(loss - reference) <= 1e-12 * reference
    gradients = {q.name: block_and_index(q.reduce()) for q in optimizer.parameters}
    held = comm.collect(sorted(gradients), grid)
    assert set().union(*held) == set(exact)
    assert difference(gradients, exact) <= 1e-10
    norm = float(np.sqrt(sum((g**2).sum() for g in exact.values())))
    assert optimizer.step() == pytest.approx(norm, rel=1e-12)
    table = {q.name: host(q.value) for q in optimizer.parameters}.get("tokens.weight")
    copies = [(at, block) for at, block in comm.collect((place.rank, table), grid) if block is not None]
    assert len(copies) == 2 * place.size
    for at, block in copies:
        assert all(np.array_equal(block, other) for place, other in copies if place == at)


@pytest.mark.grids({"pipe": 3})
def test_a_stage_makes_no_weights_of_others(grid):
    p = Parallelism(grid.at(pipe=grid.coords["pipe"]))
    model = GPT(gpt.CONFIG, p)
    mine = {id(q) for piece in partition(model, grid) for q in piece.parameters()}
    for q in model.parameters():
        if id(q) in mine:
            assert q.value.shape == q.shape
        assert (q._value is not None) == (id(q) in mine)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.grids({"pipe": 3}, {"pipe": 2, "row": 2, "col": 2}, {"row": 2})
def test_all_stages_get_the_outputs(grid, chunks):
    place = stage_grid(grid)
    p = Parallelism(place, mode_of(place))
    x = from_global(gpt.TOKENS, place, p.tokens())
    stream = ((*gpt.TOKENS.shape, gpt.CONFIG.hidden), p.stream(), "float64")
    pipeline = Pipeline(partition(GPT(gpt.CONFIG, p), grid, chunks), grid, "interleaved" if chunks > 1 else "1f1b")
    y = pipeline.outputs(x, Context(train=False), stream)
    exact, _ = GPT(gpt.CONFIG, p).forward(x, Context(train=False))
    assert y.layout == exact.layout
    assert np.allclose(host(y), host(exact), rtol=1e-12, atol=1e-14)


@pytest.mark.grids({"pipe": 3})
def test_a_stage_without_weights_is_refused(grid):
    p = Parallelism(stage_grid(grid))
    norm = [LayerNorm(H, p, "norm", **COMMON)] if grid.coords["pipe"] == 1 else []
    with pytest.raises(GridError, match="stages without weights: 0, 2 of 3; use fewer stages"):
        Pipeline([Sequential(*norm)], grid)


@pytest.mark.grids({"pipe": 3})
def test_a_weight_of_three_stages_is_refused(grid):
    p = Parallelism(stage_grid(grid))
    with pytest.raises(
        GridError, match=r"more than two stages: norm.bias, norm.gain; a weight may be tied to one other"
    ):
        Pipeline([Sequential(LayerNorm(H, p, "norm", **COMMON))], grid)
