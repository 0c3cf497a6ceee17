"""Reductions and gathers that overlap with computation give the same numbers and words, and really overlap."""

import math
import weakref

import numpy as np
import pytest

from colossal_mpi import comm, from_global, ledger, random
from colossal_mpi.comm import MessageTransport, pieces_of
from colossal_mpi.comm.transport import Completed
from colossal_mpi.layers import Context, Parallelism, TransformerBlock
from colossal_mpi.layers.containers import FanOut, Sequential
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.overlap.buckets import GradientBuckets
from colossal_mpi.layers.overlap.prefetch import Prefetch
from colossal_mpi.layers.pipeline import Pipeline, partition, stage_grid
from colossal_mpi.layout import box_shape
from tests.cases import host, totals
from tests.reference import gpt_case as case
from tests.reference.gpt_feed import GPTFeed
from tests.reference.modes import mode_of

MICROBATCHES = 3
SMALL = 1 << 13  # bytes of a bucket: most matrices have their own
each_stage = pytest.mark.parametrize("zero", [0, 1, 2, 3])


def at_once(p):
    """Return the reduced gradients, each reduced when `Parameter.reduce` asks for it."""
    model, feed = GPT(case.CONFIG, p), GPTFeed(p, MICROBATCHES)
    for mb in range(MICROBATCHES):
        y, cache = model.forward(feed.inputs(mb), feed.context(mb))
        model.backward(feed.loss_backward(feed.loss(y, mb)[1]), cache)
    return {q.name: q.reduce() for q in model.parameters()}


def on_the_way(p, size, steps=1):
    """Return the gradients that a pipeline's step reduces in buckets, and the ledger's record."""
    pipeline = Pipeline([GPT(case.CONFIG, p)], p.grid, bucket=size)
    for _ in range(steps):
        with ledger.record() as moved:
            pipeline.step(GPTFeed(p, MICROBATCHES))
            reduced = {q.name: q.reduce() for q in pipeline.parameters()}
        for q in pipeline.parameters():
            q.grad = None
    return reduced, moved


@each_stage
@pytest.mark.grids({"data": 2}, {"data": 3}, {"data": 2, "row": 2, "col": 2}, {"data": 3, "depth": 2, "col": 1})
def test_gradients_and_words_are_those_at_once(grid, zero):
    p = Parallelism(grid, mode_of(grid), zero=zero)
    with ledger.record() as once:
        exact = at_once(p)
    mine, moved = on_the_way(p, SMALL, steps=2)
    for name, gradient in exact.items():
        assert mine[name].layout == gradient.layout
        scale = np.abs(host(gradient)).max(initial=0)
        assert np.abs(host(mine[name]) - host(gradient)).max(initial=0) <= 1e-12 * scale
        if grid.axes["data"] == 2 and grid.size == 2:
            assert np.array_equal(host(mine[name]), host(gradient)), name
    assert totals([moved.words], grid) == totals([once.words], grid)


@each_stage
@pytest.mark.grids({"data": 3})
def test_bits_do_not_depend_on_the_buckets(grid, zero):
    p = Parallelism(grid, zero=zero)
    first, *others = [on_the_way(p, size)[0] for size in (0, 1 << 16, 1 << 30)]
    for other in others:
        assert all(np.array_equal(host(other[name]), host(gradient)) for name, gradient in first.items())
    again = on_the_way(p, 1 << 16)[0]
    assert all(np.array_equal(host(again[name]), host(gradient)) for name, gradient in first.items())


@each_stage
@pytest.mark.grids({"data": 2}, {"data": 3})
def test_contributions_against_expectation_are_in(grid, zero):
    """One layer runs twice, and another does not run at all."""
    p = Parallelism(grid, zero=zero)
    x = random.normal((5, 4, 10), grid, p.stream(), 0, "x")

    def gradients(buckets):
        twice, never = (LayerNorm(10, p, name, dtype="float64") for name in ("twice", "never"))
        heads = FanOut(Sequential(twice), Sequential(never))
        with buckets([heads]):
            for _ in range(2):
                y, cache = heads.forward(x, Context())
                heads.backward((y[0] * 2, None), cache)
            again, cache = twice.forward(x, Context())
            twice.backward(again, cache)
        return [q.reduce() for q in heads.parameters()]

    class Nothing:
        def __init__(self, layers):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    exact = gradients(Nothing)
    for mine, gradient in zip(gradients(lambda layers: GradientBuckets(layers, 1, 0)), exact, strict=True):
        assert np.allclose(host(mine), host(gradient), rtol=1e-12, atol=0)
    assert np.abs(host(exact[0])).max(initial=1) > 0


@pytest.mark.grids({"data": 2})
@pytest.mark.parametrize("zero", [0, 1])
def test_a_sum_left_out_is_seen(grid, zero, monkeypatch):
    def own_alone(group, block, *counts):
        return Completed(pieces_of(block, *counts)[group.rank] if counts else block)

    p, name = Parallelism(grid, zero=zero), "blocks.0.mlp.up.weight"
    exact = host(at_once(p)[name])
    monkeypatch.setattr(MessageTransport, "reduce_scatter" if zero else "allreduce", own_alone)
    mine = host(on_the_way(p, 1 << 16)[0][name])
    assert np.abs(mine - exact).max() > 1e-3 * np.abs(exact).max()


def hidden(event, spans):
    """Say whether some computation lies wholly between the begin of an operation and the wait for it."""
    return any(event.posted <= span.begun and span.ended <= event.waited for span in spans)


def under_way(moved, axes=("data",)):
    return [event for event in moved.events if event.axes == axes and event.posted > event.begun]


@pytest.mark.parametrize(("zero", "d"), [(0, 2), (1, 2), (2, 2), (1, 3), (2, 3)])
@pytest.mark.grids({"data": 2}, {"data": 3})
def test_layers_compute_while_every_bucket_but_the_last_is_reduced(grid, zero, d):
    """The last bucket holds the gradient of the first layer; after its backward pass nothing is left to compute."""
    if grid.size != d:
        pytest.skip("an allreduce of three ranks has a second phase, which begins when the first is found to be over")
    _, moved = on_the_way(Parallelism(grid, zero=zero), SMALL)
    events = sorted(under_way(moved), key=lambda event: event.begun)
    assert len(events) > 4 * case.CONFIG.layers
    assert {event.op for event in events} == {"reduce_scatter" if zero else "allgather"}
    assert all(hidden(event, moved.spans) for event in events[:-1])


@pytest.mark.grids({"data": 2}, {"data": 3})
def test_layers_compute_while_the_weights_of_the_next_are_gathered(grid):
    """Only the weights of the step's first layer are not prefetched, because no layer runs before it."""
    _, moved = on_the_way(Parallelism(grid, zero=3), 1 << 16, steps=2)
    gathers = [e for e in moved.events if e.axes == ("data",) and e.op in ("allgather", "all_to_all") and e.words > 1]
    ahead = [event for event in gathers if event.posted > event.begun]
    layers = len(GPT(case.CONFIG, Parallelism(grid)).layers)
    assert all(hidden(event, moved.spans) for event in ahead)
    # Forward and backward of every microbatch; vectors are kept, and the backward pass needs no embedding tables.
    assert len(ahead) >= MICROBATCHES * (layers - 1 + case.CONFIG.layers)
    first = min(ahead, key=lambda event: event.begun)
    at_once = [event for event in gathers if event.posted == event.begun]
    assert all(event.begun < first.waited for event in at_once if event.words > case.CONFIG.hidden)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.grids({"pipe": 2, "data": 2}, {"pipe": 3})
def test_stages_compute_while_they_send_and_reduce(grid, schedule, zero):
    """Every message overlaps, and every bucket except the last of a stage and the one with the shared table."""
    place = stage_grid(grid)
    p = Parallelism(place, zero=zero)
    chunks = partition(GPT(case.CONFIG, p), grid, 2 if schedule == "interleaved" else 1)
    pipeline = Pipeline(chunks, grid, schedule, bucket=SMALL)
    with ledger.record() as moved:
        pipeline.step(GPTFeed(p, 5))
        for q in pipeline.parameters():
            q.reduce()
    sends = [event for event in moved.events if event.op == "send"]
    borders = grid.axes["pipe"] * len(chunks) - 1
    assert totals([len(sends)], grid) == [2 * 5 * borders * place.size]
    assert all(hidden(event, moved.spans) for event in sends)
    buckets = sorted(under_way(moved), key=lambda event: event.begun)
    last = 1 + bool(pipeline.tied) * (zero == 0)
    assert place.axes.get("data", 1) == 1 or len(buckets) > last
    assert all(hidden(event, moved.spans) for event in buckets[: len(buckets) - last])


@pytest.mark.grids({"data": 2}, {"data": 2, "col": 2})
def test_at_most_two_layers_of_weights_are_there(grid, monkeypatch):
    """Only the layer that computes and the next one have gathered matrices; caches keep vectors, which do not count."""
    p, live, most = Parallelism(grid, mode_of(grid), zero=3), {}, [0]
    model = Sequential(*[TransformerBlock(20, 5, 40, p, f"blocks.{i}", dtype="float64") for i in range(6)])
    take, shapes = Prefetch.take, {id(q): q.shape for q in model.parameters()}

    def size(which, layout):
        """Return the number of elements of a matrix in the layout in which it is used."""
        shape = shapes[which]
        box = layout.on(grid.axes, len(shape)).box(shape, grid.axes, grid.coords)
        return math.prod(box_shape(box)) * (len(shape) > 1)

    def watched(self, parameter, layout):
        array = take(self, parameter, layout)
        if array is not parameter.value and array.ndim > 1:
            block = array.local
            live[id(block)] = block.size
            weakref.finalize(block, live.pop, id(block))
            coming = sum(size(*key) for key, queue in self._coming.items() if queue)
            most[0] = max(most[0], sum(live.values()) + coming)
        return array

    monkeypatch.setattr(Prefetch, "take", watched)

    def uses(prefetch):
        return [[(id(q), layout) for q, layout in visit] for visit in prefetch._uses.values()]

    x = random.normal((4, 3, 20), grid, p.stream(), 0, "x")
    prefetch = Prefetch()
    for _ in range(2):
        most[0] = 0
        with prefetch.over([model], [("forward", model), ("backward", model)]):
            y, cache = model.forward(x, Context())
            model.backward(y, cache)
    one = max(sum(size(*key) for key in visit) for visit in uses(prefetch))
    assert 1.5 * one < most[0] <= 2 * one
    assert not prefetch._coming


@each_stage
@pytest.mark.grids({"data": 3})
def test_words_of_a_step_are_the_closed_forms(grid, zero):
    """The words are summed over d ranks, for M elements of matrices and v of vectors, as without overlap."""
    p, d = Parallelism(grid, zero=zero), grid.size
    model = Sequential(TransformerBlock(10, 5, 13, p, "a", dtype="float64"), LayerNorm(10, p, "norm", dtype="float64"))
    matrix = {q: len(q.shape) > 1 and q.name.endswith("weight") for q in model.parameters()}
    matrices, vectors = (sum(q.value.size for q, kind in matrix.items() if kind is wanted) for wanted in (True, False))
    prefetch, x = Prefetch(), random.normal((6, 5, 10), grid, p.stream(), 0, "x")
    with ledger.record() as moved, GradientBuckets([model], 2, 1 << 10):
        for _ in range(2):
            with prefetch.over([model], [("forward", model), ("backward", model)]):
                y, cache = model.forward(x, Context())
                model.backward(y, cache)
        for q in model.parameters():
            q.refresh(q.reduce())
    once = matrices + vectors
    expected = {0: 2 * once, 1: 2 * once, 2: 3 * once, 3: 2 * (3 * matrices + 2 * vectors)}
    assert sum(comm.collect(moved.words, grid)) == (d - 1) * expected[zero]


@pytest.mark.grids({"data": 2})
def test_a_step_that_fails_leaves_nothing_behind(grid):
    p = Parallelism(grid, zero=3)
    pipeline = Pipeline([GPT(case.CONFIG, p)], grid)
    feed = GPTFeed(p, 2)
    feed.loss = None
    with pytest.raises(TypeError):
        pipeline.step(feed)
    assert all(q.buckets is None and q.prefetch is None for q in pipeline.parameters())
    assert pipeline.chunks[0].watchers == ()
    x = from_global(case.TOKENS, grid, p.tokens())
    assert pipeline.chunks[0].forward(x, Context())[0].shape[-1] == case.CONFIG.vocabulary
