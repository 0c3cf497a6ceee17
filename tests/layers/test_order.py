"""The order of a cut sequence gives all ranks of a ring the same work, with documents of any lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_mpi import Grid
from colossal_mpi.layers import Parallelism
from colossal_mpi.layers.order import MOST_RUNS, balanced, runs, zigzag
from colossal_mpi.layout import part
from tests.generated import examples


def packed(samples, length, median, spread, seed=0):
    """Return the documents of sequences that are cut from texts whose lengths are distributed log-normally."""
    rng, found = np.random.default_rng(seed), np.zeros((samples, length), int)
    for row in found:
        at = -int(rng.integers(0, median))
        while at < length:
            size = max(1, int(median * np.exp(spread * rng.standard_normal())))
            row[max(0, at) : max(0, at + size)] = max(0, at)
            at += size
    return found


def excess(work, order, ranks):
    blocks = [order[slice(*part(len(order), ranks, rank))] for rank in range(ranks)]
    loads = np.array([work[block].sum() for block in blocks])
    return loads.max() / loads.mean()


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize(("length", "ranks"), [(4096, 2), (4099, 3), (4096, 4), (8192, 8), (32768, 8)])
def test_no_rank_has_5_percent_more_than_the_mean(length, ranks, samples):
    p = Parallelism(Grid.meta(seq=ranks))
    for median, spread in ((256, 1.0), (1024, 1.0), (4096, 0.8), (16384, 0.5)):
        documents = packed(samples, length, median, spread)
        order, keys = p.order(length, documents), (np.arange(1, length + 1) - documents).sum(0)
        assert np.array_equal(np.sort(order), np.arange(length))
        assert excess(keys, order, ranks) <= 1.05


def test_each_group_of_samples_has_a_ring_that_is_balanced():
    p = Parallelism(Grid.meta(data=4, seq=4))
    documents = packed(16, 4096, 1024, 1.0)
    order, keys = p.order(4096, documents), np.arange(1, 4097) - documents
    assert max(excess(keys[4 * i : 4 * i + 4].sum(0), order, 4) for i in range(4)) <= 1.05
    assert max(excess(keys[4 * i : 4 * i + 4].sum(0), zigzag(4096, 4), 4) for i in range(4)) > 1.2


def test_a_sequence_of_one_document_keeps_the_zigzag():
    p = Parallelism(Grid.meta(seq=4))
    assert np.array_equal(p.order(1021, np.zeros((3, 1021), int)), p.order(1021))
    assert Parallelism(Grid.meta(ulysses=4)).order(64, np.zeros((3, 64), int)) is None


@examples(3)
@given(st.integers(1, 6), st.integers(0, 90), st.integers(1, 3), st.integers(0, 1 << 20))
def test_every_order_has_each_token_once_and_few_runs(ranks, length, groups, seed):
    work = np.random.default_rng(seed).integers(0, 50, (groups, length))
    order = balanced(work, ranks)
    assert np.array_equal(np.sort(order), np.arange(length))
    for rank in range(ranks):
        block = order[slice(*part(length, ranks, rank))]
        assert np.array_equal(block, np.sort(block))
        assert len(runs(order, *part(length, ranks, rank))) <= MOST_RUNS
