"""The hidden tokens and the pairs depend on seed and sample number alone, in the shares of BERT."""

import numpy as np
import pytest

from colossal_mpi.apps.data.masked import BYTE_VALUES, CLS, MASK, SEP, MaskedFormat

TEXT = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
MANY = np.random.default_rng(1).integers(0, 4000, 400)


def make(form, starts=MANY, first=0, seed=0):
    return form.make(TEXT, starts, first, seed, "data")


def plain(form, made):
    """Return the rows as they were before anything was hidden."""
    return np.where(made.labels >= 0, made.labels, made.inputs)


def test_a_sequence_is_text_between_marks():
    form = MaskedFormat(13, False, 0.15)
    rows = plain(form, make(form))
    assert np.array_equal(rows[:, [0, -1]], np.tile([CLS, SEP], (400, 1)))
    assert np.array_equal(rows[:, 1:-1], TEXT[MANY[:, None] + np.arange(11)])
    assert not make(form).segments.any()
    assert not make(form).unrelated.any()


def test_the_second_part_follows_or_is_from_elsewhere():
    form = MaskedFormat(14, True, 0.15)
    made = make(form)
    rows, follows = plain(form, made), TEXT[MANY[:, None] + np.arange(11)]
    assert np.array_equal(rows[:, [0, 7, 13]], np.tile([CLS, SEP, SEP], (400, 1)))
    assert np.array_equal(rows[:, 1:7], follows[:, :6])
    assert np.array_equal((rows[:, 8:13] != follows[:, 6:]).any(1), made.unrelated == 1)
    assert np.array_equal(made.segments, np.tile([0] * 8 + [1] * 6, (400, 1)))
    assert abs(made.unrelated.mean() - 0.5) < 5 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize("pairs", [False, True])
def test_every_row_hides_the_same_share_of_its_bytes_80_10_10(pairs):
    form = MaskedFormat(64, pairs, 0.15)
    made = make(form)
    hidden = made.labels >= 0
    assert form.hidden == 9
    assert np.all(hidden.sum(1) == 9)
    assert np.all(plain(form, made)[hidden] < BYTE_VALUES)
    shown, labels, n = made.inputs[hidden], made.labels[hidden], hidden.sum()
    replaced = (shown != MASK) & (shown != labels)
    shares = {0.8: (shown == MASK).mean(), 0.1 * 255 / 256: replaced.mean(), 0.1 + 0.1 / 256: (shown == labels).mean()}
    for exact, seen in shares.items():
        assert abs(seen - exact) < 5 * np.sqrt(exact * (1 - exact) / n)
    assert len(np.unique(shown[replaced])) > 100
    columns = hidden[:, 1:-1].mean(0)
    bytes_only = columns if not pairs else np.delete(columns, 31)
    share = 9 / form.bytes
    assert abs(bytes_only - share).max() < 5 * np.sqrt(share * (1 - share) / 400)


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_depend_on_seed_and_number_alone(pairs):
    form = MaskedFormat(20, pairs, 0.3)
    whole = make(form, first=7)
    for low, high in ((0, 3), (3, 3), (3, 400)):
        part = make(form, MANY[low:high], first=7 + low)
        for name in ("inputs", "labels", "segments", "unrelated"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[low:high])
    for different in (make(form, first=8), make(form, first=7, seed=1)):
        assert not np.array_equal(different.labels >= 0, whole.labels >= 0)


@pytest.mark.parametrize("length", [5, 6])
def test_the_shortest_sequences_hide_a_token(length):
    form = MaskedFormat(length, True, 0.01)
    made = make(form)
    assert form.hidden == 1
    assert np.all((made.labels >= 0).sum(1) == 1)
