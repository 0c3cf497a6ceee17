"""BERT's two heads and its segments give the right gradients, and each reduction of its backward pass is needed."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, ShapeError, comm, from_global, random
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.embedding import SegmentEmbedding
from colossal_mpi.layers.models import Bert, BertConfig
from tests.cases import host
from tests.reference import gpt_case
from tests.reference.modes import few, mode_of, parallelism
from tests.reference.saboteur import Saboteur

B, S, V = 3, 5, 11
CONFIG = BertConfig(V, layers=1, hidden=10, heads=5, positions=7, segments=3, inner=7, std=0.3, dtype="float64")
_rng = np.random.default_rng(8)
TOKENS, SEGMENTS = _rng.integers(0, V, (B, S)), _rng.integers(0, 3, (B, S))
MASK = np.arange(S) < np.array([5, 2, 4])[:, None]


def forward(p):
    """Return the model, its outputs, random cotangents of them and the cache."""
    ids, segments, mask = (from_global(a, p.grid, p.tokens()) for a in (TOKENS, SEGMENTS, MASK))
    model = Bert(CONFIG, p)
    logits, cache = model.forward(ids, Context(mask=mask, segments=segments))
    whole = [Layout(*[None] * y.ndim) for y in logits]
    return (
        model,
        logits,
        [random.normal(y.shape, p.grid, w, 1, "dy") for y, w in zip(logits, whole, strict=True)],
        cache,
    )


def gradients(p, take=(True, True), later=None, partial=()):
    """Return the whole gradients for the cotangents in `take`, which are in the layout of the logits or partial."""
    model, _, dy, cache = forward(p)
    dy = [part.redistribute(part.layout.with_partial(*partial)) for part in dy]
    model.backward(tuple(part if taken else None for part, taken in zip(dy, take, strict=True)), cache, later)
    for work in later or ():
        work()
    return {q.name: q.reduce().gather() for q in model.parameters()}


def difference(mine, exact):
    return gpt_case.difference({name: (g, ...) for name, g in mine.items()}, exact)


@few
def test_a_cotangent_may_be_none_and_both_add_up(grid):
    p = parallelism(grid)
    both, tokens, follows = (gradients(p, take) for take in ((True, True), (True, False), (False, True)))
    assert difference({name: tokens[name] + follows[name] for name in both}, both) <= 1e-10
    assert all(abs(follows[name]).max() == 0 for name in both if name.startswith("predictions"))
    assert all(abs(tokens[name]).max() == 0 for name in both if name.startswith(("pooler", "next_sentence")))
    model, _, dy, cache = forward(p)
    for wrong in ((None, None), dy[:1]):
        with pytest.raises(ShapeError, match="cotangents of 2 outputs must be as many, and one of them not None"):
            model.backward(wrong, cache)


@few
def test_cotangents_may_be_partial_and_weight_products_come_later(grid):
    exact = gradients(Parallelism(Grid(MPI.COMM_SELF)))
    several = [axis for axis, size in grid.axes.items() if size > 1]
    for keep in (True, False):
        mine = gradients(Parallelism(grid, mode_of(grid), keep), later=[], partial=several)
        assert difference(mine, exact) <= 1e-10


@few
def test_segments_are_rows_of_the_table_and_none_are_the_first(grid):
    p = parallelism(grid)
    layer = SegmentEmbedding(3, 4, p, "segments", std=1.0, dtype="float64")
    x = random.normal((B, S, 4), grid, p.stream(), 2, "x")
    table, given = layer.table.value.gather(), from_global(SEGMENTS, grid, p.tokens())
    for segments, rows in ((given, table[SEGMENTS]), (given.replicated(), table[SEGMENTS]), (None, table[0])):
        y, _ = layer.forward(x, Context(segments=segments))
        assert y.layout == x.layout
        assert np.array_equal(y.gather(), x.gather() + rows)
    for wrong, message in ((SEGMENTS[:, 1:], "the segments must be of shape"), (SEGMENTS + 1, "must be from 0 to 2")):
        with pytest.raises(ShapeError, match=message):
            layer.forward(x, Context(segments=from_global(wrong, grid, Layout(None, None))))


@pytest.mark.deadline(120)
@pytest.mark.grids({"col": 2}, {"row": 1, "col": 2, "depth": 2})
def test_any_reduction_left_out_of_the_heads_and_segments_is_missed(grid, monkeypatch):
    exact, p = gradients(Parallelism(Grid(MPI.COMM_SELF))), parallelism(grid)
    saboteur = Saboteur(monkeypatch)

    def sabotaged(victim):
        model, _, dy, cache = forward(p)
        saboteur.arm(victim)
        model.backward(tuple(dy), cache)
        reduced = {q.name: q.reduce() for q in model.parameters()}
        saboteur.armed = False
        return {name: g.gather() for name, g in reduced.items()}

    assert difference(sabotaged(None), exact) <= 1e-10
    for victim, reduction in enumerate(list(saboteur.log)):
        seen = max(comm.collect(difference(sabotaged(victim), exact), grid))
        assert seen > 1e-10, f"reduction {victim} of the backward pass, {reduction}, is not missed"


@pytest.mark.grids({"row": 2, "col": 3})
def test_blocks_of_a_tiny_bert_may_be_empty(grid, monkeypatch):
    tiny = BertConfig(V, layers=1, hidden=1, heads=1, positions=5, segments=3, inner=1, dtype="float64", eps=1e-2)
    monkeypatch.setitem(globals(), "CONFIG", tiny)
    _, logits, _, _ = forward(parallelism(grid))
    _, exact, _, _ = forward(Parallelism(Grid(MPI.COMM_SELF)))
    for mine, whole in zip(logits, exact, strict=True):
        assert np.max(abs(mine.gather() - host(whole)), initial=0) <= 1e-12 * abs(host(whole)).max()
