"""The words, bytes and work of attention on a cut sequence equal their closed forms."""

import itertools
import time
import tracemalloc
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, OptionError, ShapeError, comm, from_global, ledger, random
from colossal_mpi.distarray import zeros
from colossal_mpi.layers import Context, Parallelism, kernels
from colossal_mpi.layers.attention import ring
from colossal_mpi.layers.attention.mask import AttentionMask
from colossal_mpi.layers.attention.self_attention import Attention, GroupedAttention, SelfAttention
from colossal_mpi.layers.kernels.reference import tiles
from colossal_mpi.layers.order import zigzag
from colossal_mpi.layout import part
from colossal_mpi.testing import fake
from tests.cases import host
from tests.reference import sequence_case as case
from tests.reference.gpt_case import block_and_index, difference

formulas = import_module("colossal_mpi.layers.kernels.reference.attention")
B, A, D = 2, 4, 3
RNG = np.random.default_rng(8)


def words(layer, x, ctx=None):
    """Return the words that this rank receives in both passes, and in the forward pass alone."""
    with ledger.record() as moved:
        y, cache = layer.forward(x, ctx or Context())
        there = moved.words
        layer.backward(y, cache)
    return moved.words, there


@pytest.mark.parametrize("s", [12, 11])
@pytest.mark.grids({"seq": 2}, {"seq": 3}, {"seq": 4}, {"seq": 2, "col": 2})
def test_words_of_a_ring(grid, s):
    """Each rank receives the keys that it sees, twice, and the cotangents of its own keys from all that see them."""
    p, c, rank, col = case.parallelism(grid), grid.axes["seq"], grid.coords["seq"], grid.axes.get("col", 1)
    width = 2 * D * 2 // col  # words of a token's keys and values
    q, kv = (
        random.normal((B, s, *n, D), grid, p.inside(x, "g"), 0, x) for x, n in (("bsgrd", (2, 2)), ("bstgd", (2, 2)))
    )
    order, blocks = p.order(s), [slice(*part(s, c, i)) for i in range(c)]
    few = np.array([[0] * 4 + [4] * 7 + [11] * (s - 11), [0] + [1] * (s - 1)])
    for ctx, window in itertools.product(
        (Context(), Context(order=order), Context(documents=few), Context(documents=few, order=order)), (None, 3)
    ):
        tokens = np.arange(s) if ctx.order is None else ctx.order
        seen = np.broadcast_to(visible(s, ctx.documents, window), (B, s, s))[:, tokens][:, :, tokens]

        def count(reader, source, seen=seen):
            return int(seen[:, blocks[reader], blocks[source]].any(1).sum()) * (reader != source)

        there, home = (sum(count(*pair[::step]) for pair in ((rank, i) for i in range(c))) for step in (1, -1))
        layer = GroupedAttention(p, "g", "g", window=window)
        received = words(layer, (q, kv), ctx)
        assert received == (width * (2 * there + home), width * there)
        if ctx.documents is not None:
            joined = words(layer, (q, kv), Context(order=ctx.order))
            with_documents, without = (sum(comm.collect(total[0], grid)) for total in (received, joined))
            assert with_documents < without if window is None else with_documents <= without
    # positions are compared: blocks go whole, or not at all if they are hidden
    n = [B * (block.stop - block.start) for block in blocks]
    there, home = (width * sum(n[i] for i in range(c) if i > rank), width * n[rank] * rank)
    backwards = Context(positions=np.arange(s)[::-1].copy())
    assert words(GroupedAttention(p, "g", "g"), (q, kv), backwards) == (2 * there + home, there)
    there, home = width * (B * s - n[rank]), width * n[rank] * (c - 1)
    assert words(GroupedAttention(p, "g", "g", causal=False), (q, kv)) == (2 * there + home, there)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("c", "s", "b"), [(2, 11, 3), (3, 29, 4), (5, 23, 1), (4, 3, 2)])
def test_of_each_sample_the_keys_that_some_query_sees_are_sent_and_no_others(c, s, b, window):
    starts = RNG.random((b, s)) < RNG.random((b, 1))  # a whole sequence, documents of one token, and between
    documents = np.maximum.accumulate(np.where(starts, np.arange(s), 0), axis=1)
    p, blocks = Parallelism(Grid.meta(seq=c)), [slice(*part(s, c, i)) for i in range(c)]
    for order in (np.arange(s), p.order(s), p.order(s, documents)):
        seen = visible(s, documents, window)[:, order][:, :, order]
        for reader, source in itertools.permutations(range(c), 2):
            x = zeros((b, s, 3, 1, 2), Grid.meta(reader, seq=c), p.attention("bstad", "a", "a"))
            mask = AttentionMask(x, True, Context(documents=documents, order=order), window)
            sent, rows = np.zeros((b, blocks[source].stop - blocks[source].start), int), mask.rows(reader, source)
            boxes = mask.boxes(reader, source)
            for box in [(slice(None), at) for at in rows] if boxes is None else [box[:2] for box in boxes]:
                sent[box] += 1
            assert np.array_equal(sent, seen[:, blocks[reader], blocks[source]].any(1))


def visible(s, documents=None, window=None):
    """Return the queries ``[b, s, 1]`` and keys ``[b, 1, s]`` of causal attention that see each other, as bool."""
    queries, keys = np.arange(s)[:, None], np.arange(s)
    first = np.zeros((1, s), int) if documents is None else documents
    lowest = first[:, :, None] if window is None else np.maximum(first[:, :, None], queries - window + 1)
    return (lowest <= keys) & (keys <= queries)


@pytest.mark.grids({"ulysses": 2}, {"ulysses": 4}, {"seq": 2, "ulysses": 2}, {"seq": 4})
def test_words_of_a_layer_whose_heads_are_cut(grid):
    """Each of c ranks receives 8 (c - 1) / c^2 of b s h words, and those of a ring of its heads and tokens."""
    sequence = "ulysses" if list(grid.axes) == ["seq"] else "ring"
    p, s, h = case.parallelism(grid, sequence=sequence), 8, 2 * A
    layer = SelfAttention(h, A, p, "attention", dtype="float64")
    x = random.normal((B, s, h), grid, p.stream(), 0, "x")
    r = grid.axes["seq"] if p.ring else 1
    c = grid.size // r
    expected = 8 * (c - 1) * B * (s // r) * h // c**2
    if r > 1:  # rank i sees the keys of i ranks, and r - 1 - i see its own
        i = grid.coords["seq"]
        expected += 2 * (2 * i + r - 1 - i) * B * (s // r) * h // c
    assert words(layer, x)[0] == expected


@pytest.mark.grids({"seq": 3}, {"seq": 2, "ulysses": 2})
def test_a_mask_is_gathered_once(grid):
    p, s = case.parallelism(grid), 12
    x = random.normal((B, s, 3, A, D), grid, p.inside("bstad", "a"), 0, "x")
    mask = from_global(np.arange(s) < np.array([[5], [12]]), grid, p.tokens())
    plain, masked = (words(Attention(p, causal=False), x, Context(mask=mask if given else None)) for given in (0, 1))
    extra = B * s - mask.local.size
    assert [with_mask - without for with_mask, without in zip(masked, plain, strict=True)] == [extra, extra]


@pytest.mark.grids({"data": 2, "seq": 2}, {"seq": 4})
def test_memory_falls_with_the_ring(grid, monkeypatch):
    """Each of c ranks keeps and uses at most a c-th of the memory that a ring of one rank would need."""
    for name, value in {"LENGTH": 32, "LEAST": 32, "SCORES": 1 << 10}.items():
        monkeypatch.setattr(tiles, name, value)
    data, c, s, width = grid.axes.get("data", 1), grid.axes["seq"], 2048, 64
    p = case.parallelism(grid)
    x = random.normal((data, s, 3, 1, width), grid, p.attention("bstad", "a", "a"), 0, "x")
    array = 8 * s * width // c
    layer, ctx = Attention(p), Context(order=p.order(s))
    tracemalloc.start()
    y, cache = layer.forward(x, ctx)
    kept, there = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    layer.backward(y, cache)
    back = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    arrays = [kept / array, there / array, back / array]
    assert arrays[0] == pytest.approx(4, rel=0.05)  # q, k, v and the output
    assert arrays[1] <= 13  # also keys and values of this step, of the next and on departure, and parts of the output
    assert arrays[2] <= 23  # also dq, the keys sent, and the cotangents of k and v of this step, coming and going


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_zigzag_balances_what_contiguous_blocks_do_not(ranks):
    for length in (64 * ranks, 64 * ranks + 1, 65 * ranks - 1, 2000, 2039):
        order = zigzag(length, ranks)
        assert np.array_equal(np.sort(order), np.arange(length))
        blocks = [slice(*part(length, ranks, i)) for i in range(ranks)]
        pairs, plain = (np.array([np.sum(x[b] + 1) for b in blocks]) for x in (order, np.arange(length)))
        assert pairs.max() / pairs.mean() <= 1.02
        assert plain.max() / plain.mean() == pytest.approx(2 - 1 / ranks, abs=2 * ranks / length)


@pytest.fixture
def work_of(grid, monkeypatch):
    """Return a function to the scores that the kernel computes on each rank, forward and backward."""
    for name, value in {"LENGTH": 8, "LEAST": 8}.items():
        monkeypatch.setattr(tiles, name, value)
    done, scores = [], formulas._scores

    def counted(q, k):
        done.append(k.shape[0] * k.shape[2] * q.shape[2])
        return scores(q, k)

    monkeypatch.setattr(formulas, "_scores", counted)

    def work(b, s, ctx):
        done.clear()
        p = case.parallelism(grid)
        x = random.normal((b, s, 3, 1, 2), grid, p.attention("bstad", "a", "a"), 0, "x")
        y, cache = Attention(p).forward(x, ctx)
        Attention(p).backward(y, cache)
        return np.array(comm.collect(sum(done), grid))

    return work


@pytest.mark.parametrize("zigzag", [True, False], ids=["zigzag", "contiguous"])
@pytest.mark.grids({"seq": 3}, {"seq": 4})
def test_work_is_balanced(grid, work_of, zigzag):
    s, c = 1021, grid.axes["seq"]
    work = work_of(1, s, Context(order=case.parallelism(grid).order(s) if zigzag else None))
    balance = work.max() / work.mean()
    assert balance <= 1.02 if zigzag else balance == pytest.approx(2 - 1 / c, abs=0.02)
    assert work.sum() <= 1.03 * s * (s + 1)  # both passes of half a square, and the rest of tiles on its diagonal


@pytest.mark.grids({"seq": 2}, {"seq": 3})
def test_each_message_but_the_last_home_is_under_way_while_some_keys_are_attended_to(grid, monkeypatch):
    spans = []

    def timed(function):
        def call(*values):
            begun = time.perf_counter()
            result = function(*values)
            spans.append((begun, time.perf_counter()))
            return result

        return call

    for name in ("attention", "attention_backward"):
        monkeypatch.setattr(kernels.of(grid), name, timed(getattr(kernels.of(grid), name)))
    p, c = case.parallelism(grid), grid.axes["seq"]
    x = random.normal((1, 64, 3, 1, 8), grid, p.attention("bstad", "a", "a"), 0, "x")
    with ledger.record() as moved:
        words(Attention(p), x, Context(order=p.order(64)))
    assert [event.op for event in moved.events] == ["receive"] * (3 * c - 3)
    hidden = [any(e.posted <= begun and end <= e.waited for begun, end in spans) for e in moved.events]
    assert hidden == [True] * (3 * c - 4) + [False]


class Vandal:
    """While armed, it zeroes the blocks that one exchange of a ring brings; the messages themselves go through."""

    def __init__(self, monkeypatch):
        self.armed, self.victim, self.seen = False, None, 0
        exchange = ring._exchange

        def wrapped(send, recv, mask, stream):
            pending, lost = exchange(send, recv, mask, stream), self.armed and self.seen == self.victim
            self.seen += self.armed
            return Lost(pending, recv[1]) if lost else pending

        monkeypatch.setattr(ring, "_exchange", wrapped)

    def arm(self, victim):
        self.armed, self.victim, self.seen = True, victim, 0


class Lost:
    def __init__(self, pending, blocks):
        self.pending, self.blocks = pending, blocks

    def wait(self):
        self.pending.wait()
        for block in self.blocks:
            block[...] = 0


@pytest.mark.grids({"seq": 2}, {"seq": 3}, {"seq": 2, "ulysses": 2})
def test_any_message_of_the_backward_pass_that_is_lost_is_missed(grid, monkeypatch):
    """The last message brings the cotangents of keys and values back to the rank that holds the keys."""
    _, exact = case.run("bert", Parallelism(Grid(MPI.COMM_SELF)))
    exact, p, vandal = {name: host(g) for name, g in exact.items()}, case.parallelism(grid), Vandal(monkeypatch)

    def off(victim):
        _, gradients = case.run("bert", p, armed=lambda: vandal.arm(victim))
        vandal.armed = False
        gradients = {name: block_and_index(g) for name, g in gradients.items()}
        return max(comm.collect(difference(gradients, exact), grid))

    assert off(None) <= 1e-10
    c, layers = grid.axes["seq"], 2
    assert vandal.seen == layers * 2 * (c - 1)
    assert min(off(victim) for victim in range(vandal.seen)) > 1e-10


@pytest.mark.grids({"seq": 2, "col": 2}, {"seq": 2, "ulysses": 2})
def test_more_ranks_than_tokens_or_heads_leave_blocks_empty(grid):
    def results(p, s, a):
        layer = SelfAttention(6, a, p, "attention", width=2, std=0.5, out_std=0.5, dtype="float64")
        x = random.normal((B, s, 6), p.grid, p.stream(), 0, "x")
        y, cache = layer.forward(x, Context())
        dx = layer.backward(y, cache)
        return {"y": y, "dx": dx, **{q.name: q.reduce() for q in layer.parameters()}}

    for s, a in ((1, 1), (3, 1), (1, 3)):
        exact = {name: host(array) for name, array in results(Parallelism(Grid(MPI.COMM_SELF)), s, a).items()}
        mine = {name: block_and_index(array) for name, array in results(case.parallelism(grid), s, a).items()}
        assert difference(mine, exact) <= 1e-10


def pass_of(p, ctx, dtype="float64"):
    """Return output and cotangent of packed heads, rounded to a dtype."""
    x = random.normal((B, 23, 3, A, 8), p.grid, p.inside("bstad", "a"), 0, "x").astype(dtype)
    layer = Attention(p)
    y, cache = layer.forward(x, ctx)
    dx = layer.backward(random.normal(y.shape, p.grid, y.layout, 0, "dy").astype(dtype), cache)
    return y, dx


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.grids({"seq": 4})
def test_16_bit_floats_are_summed_in_32_all_the_way_round(grid, dtype):
    """Results are rounded once, as on one rank, however many parts are merged."""
    alone = Parallelism(Grid(MPI.COMM_SELF))
    mine, exact = (pass_of(p, Context(), dtype) for p in (case.parallelism(grid), alone))
    eps = float(ml_dtypes.finfo(dtype).eps)
    for array, whole in zip(mine, exact, strict=True):
        assert array.dtype == np.dtype(dtype)
        array, whole = (x.astype("float64") for x in (array, whole))
        assert abs(array.gather() - host(whole)).max() <= 2 * eps * abs(host(whole)).max()


@pytest.mark.parametrize("aware", [False, True], ids=["staged", "aware"])
@pytest.mark.grids({"seq": 3})
def test_a_ring_of_devices_has_the_bits_of_the_host(grid, monkeypatch, aware):
    fake.install()
    monkeypatch.setenv("COLOSSAL_MPI_CUDA_AWARE", str(int(aware)))
    ours, theirs = case.parallelism(grid), case.parallelism(Grid(device="fake", **grid.axes))
    for order in (None, ours.order(23)):
        arrays = zip(*(pass_of(p, Context(order=order)) for p in (ours, theirs)), strict=True)
        assert all(np.array_equal(host(mine), host(other)) for mine, other in arrays)


@pytest.mark.grids({"seq": 2})
def test_what_cannot_be_is_refused(grid):
    with pytest.raises(OptionError, match="sequence='zigzag': use one of 'ring', 'ulysses'"):
        Parallelism(grid, sequence="zigzag")
    p = Parallelism(grid)
    x = random.normal((B, 6, 3, A, D), grid, p.inside("bstad", "a"), 0, "x")
    with pytest.raises(ShapeError, match=r"positions must be of shape \[s\] = \[6\]"):
        Attention(p).forward(x, Context(order=p.order(7)))
    with pytest.raises(ShapeError, match="the mask must be of shape"):
        Attention(p).forward(x, Context(mask=from_global(np.ones((B, 5), bool), grid, Layout(None, None))))
