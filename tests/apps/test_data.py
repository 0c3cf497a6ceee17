"""The corpus and the order of its samples depend on the seed and the global sample number alone."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError, Grid, Layout
from colossal_mpi.apps.data import corpus as data
from colossal_mpi.apps.data import sampling


@pytest.mark.grids({}, {"row": 2, "col": 2})
def test_the_documentation_of_python_is_the_default_corpus(grid):
    corpus = data.read_corpus([], 0.1, 64, grid)
    assert len(corpus.train) + len(corpus.validation) > 300_000
    assert abs(len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) - 0.1) < 0.01
    assert b"lambda" in corpus.train.tobytes()


@pytest.mark.grids({"data": 2, "col": 2}, {"data": 3})
def test_every_rank_draws_its_part_of_the_same_batch(grid):
    tokens = np.arange(1000) % 251
    starts = sampling.random_starts(14, 21, len(tokens), 9, seed=3)
    x, labels = sampling.sequences(tokens, starts, 9, grid, Layout("data", None))
    whole = tokens[starts[:, None] + np.arange(9)]
    assert np.array_equal(x.gather(), whole)
    assert np.array_equal(labels.gather(), tokens[starts[:, None] + 1 + np.arange(9)])


def test_every_tenth_stretch_is_held_out():
    corpus = data.split(np.arange(90_000), 0.1)
    assert np.array_equal(corpus.validation, np.r_[36_864:40_960, 77_824:81_920])
    assert np.array_equal(np.sort(np.concatenate([corpus.train, corpus.validation])), np.arange(90_000))


def test_samples_depend_on_their_number_only():
    whole = sampling.random_starts(0, 40, 10_000, 16, seed=5)
    parts = [sampling.random_starts(a, b, 10_000, 16, seed=5) for a, b in ((0, 13), (13, 14), (14, 40))]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(sampling.random_starts(0, 40, 10_000, 16, seed=6), whole)
    assert whole.min() >= 0
    assert whole.max() + 16 < 10_000


def test_every_item_is_drawn_once_in_an_epoch_and_in_another_order_in_the_next():
    epochs = sampling.shuffled(0, 21, 7, seed=2).reshape(3, 7)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(7), (3, 1)))
    assert len({tuple(order) for order in epochs}) == 3
    parts = [sampling.shuffled(a, b, 7, seed=2) for a, b in ((0, 5), (5, 5), (5, 16), (16, 21))]
    assert np.array_equal(np.concatenate(parts), epochs.ravel())
    assert not np.array_equal(sampling.shuffled(0, 7, 7, seed=3), epochs[0])


def test_shifts_depend_on_their_number_only_and_reach_every_place():
    whole = sampling.random_shifts(0, 200, 1, seed=0)
    parts = [sampling.random_shifts(a, b, 1, seed=0) for a, b in ((0, 3), (3, 200))]
    assert np.array_equal(np.concatenate(parts), whole)
    assert {tuple(move) for move in whole} == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert not sampling.random_shifts(0, 9, 0, seed=0).any()


@pytest.mark.grids({}, {"data": 3})
def test_an_unreadable_file_is_the_same_error_on_all_ranks(grid):
    with pytest.raises(ConfigError, match="data.files: cannot read /nowhere/text: No such file"):
        data.read_corpus(["/nowhere/text"], 0.1, 8, grid)


def test_a_corpus_shorter_than_the_context_is_refused(tmp_path):
    (tmp_path / "short").write_bytes(b"x" * 50)
    with pytest.raises(ConfigError, match="the corpus has 50 bytes, 5 of them for validation"):
        data.read_corpus([str(tmp_path / "short")], 0.1, 8, Grid(MPI.COMM_SELF))
