"""Random arrays are bitwise the same on every grid, never change, and have the statistics of their distributions."""

import math

import numpy as np
import pytest

from colossal_mpi import Layout, LayoutError, comm, random
from colossal_mpi.random import normal_block, philox, uniform_block
from tests.cases import block_of, host, layouts, refusal, some

N = 400_000
MAKERS = {"uniform": (random.uniform, uniform_block), "normal": (random.normal, normal_block)}
KNOWN = {
    "zeros": ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}

GOLDEN = ["0x1.3d999f790d5dfp-1", "0x1.f4c04012dbeecp-3", "0x1.418342ed00f71p-1", "0x1.1c8798c05a536p-2"]
EPS = 2.0**-52

on_makers = pytest.mark.parametrize(("maker", "block"), MAKERS.values(), ids=MAKERS)


def whole_of(block, shape, seed=0, stream=""):
    """Return the global array, made in one piece."""
    return block(tuple((0, n) for n in shape), shape, seed, stream)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN.values(), ids=KNOWN)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert [int(word[0]) for word in philox([np.array([x], np.uint64) for x in counter], key)] == words


def test_philox_is_vectorised_over_counters_that_broadcast():
    columns, rows = np.arange(5, dtype=np.uint64)[None, :], np.arange(3, dtype=np.uint64)[:, None]
    zero = np.zeros((1, 1), np.uint64)
    words = philox([columns, zero, rows, zero], (7, 11))
    for i, j in np.ndindex(3, 5):
        alone = philox([np.array([x], np.uint64) for x in (j, 0, i, 0)], (7, 11))
        assert [int(word[i, j]) for word in words] == [int(word[0]) for word in alone]


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 1, "col": 4}, {"row": 1, "col": 1})
@pytest.mark.parametrize("shape", [(), (7,), (7, 5), (1, 9), (2, 3, 5), (0, 4), (3, 0)], ids=str)
@on_makers
def test_blocks_are_bitwise_those_of_one_rank(grid, shape, maker, block):
    whole = whole_of(block, shape or (1,), 3, "w").reshape(shape)
    for layout in some(layouts(len(shape), list(grid.axes), partial=False), 20):
        array = maker(shape, grid, layout, seed=3, stream="w")
        assert array.shape == shape
        assert array.dtype == np.float64
        assert host(array).tobytes() == block_of(whole, layout, grid).tobytes(), layout


@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2})
@on_makers
def test_replicas_are_bitwise_equal(grid, maker, block):
    array = maker((7, 5), grid, Layout(None, None))
    assert len(set(comm.collect(host(array).tobytes(), grid))) == 1


@pytest.mark.grids({"row": 2, "col": 2})
@on_makers
def test_partial_sums_are_refused(grid, maker, block):
    kind, text = refusal(lambda: maker((7, 5), grid, Layout("row", None, partial="col")), grid)
    assert kind is LayoutError
    assert "make them without partial sums and redistribute" in text


@on_makers
@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("stop", [4, 5, 6, 9])
def test_columns_may_start_and_end_anywhere(maker, block, start, stop):
    whole = whole_of(block, (3, 9))
    assert np.array_equal(block(((1, 3), (start, stop)), (3, 9), 0, ""), whole[1:3, start:stop])


@on_makers
def test_indices_above_32_bits_do_not_repeat(maker, block):
    far, shape = 2**33 + 5, (2**34, 2**34)
    corners = [block(((row, row + 1), (col, col + 4)), shape, 0, "") for row in (5, far) for col in (6, far + 1)]
    assert len(np.unique(corners)) == 16


def test_the_numbers_never_change():
    """Checkpoints, and runs that are repeated years later, depend on them."""
    assert [x.hex() for x in whole_of(uniform_block, (4,), 1, "layer.w")] == GOLDEN


def test_normal_numbers_are_the_box_muller_transform_of_uniform_ones():
    u, z = whole_of(uniform_block, (5, 8)).reshape(-1, 2), whole_of(normal_block, (5, 8)).reshape(-1, 2)
    for (one, two), pair in zip(u, z, strict=True):
        radius, angle = math.sqrt(-2 * math.log(1 - one)), 2 * math.pi * two
        assert pair == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)], rel=8 * EPS)


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_normal_numbers_are_finite_whatever_the_words(monkeypatch, word):
    words = np.full((1, 2), word, np.uint64)
    monkeypatch.setattr(random, "_words", lambda *_: ([words, words], slice(0, 4)))
    assert np.isfinite(normal_block(((0, 4),), (4,), 0, "")).all()


def bound(variance):
    """Return five standard deviations of a mean of N independent numbers of this variance."""
    return 5 * math.sqrt(variance / N)


def distance(sample, cdf):
    """Return the Kolmogorov-Smirnov distance of a sample to a distribution."""
    at = cdf(np.sort(sample))
    steps = np.arange(len(sample) + 1) / len(sample)
    return max(np.max(steps[1:] - at), np.max(at - steps[:-1]))


KS = math.sqrt(math.log(2 / 1e-6) / 2 / N)
"""Exceeded with probability 1e-6 (Dvoretzky-Kiefer-Wolfowitz)."""


def test_uniform_numbers_are_uniform():
    x = whole_of(uniform_block, (N,))
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(x.mean() - 1 / 2) < bound(1 / 12)
    assert abs(((x - 1 / 2) ** 2).mean() - 1 / 12) < bound(1 / 180)
    assert distance(x, lambda t: t) < KS


def test_normal_numbers_are_normal():
    x = whole_of(normal_block, (N,))
    assert np.isfinite(x).all()
    assert abs(x.mean()) < bound(1)
    assert abs((x**2).mean() - 1) < bound(2)
    assert abs((x**3).mean()) < bound(15)
    assert abs((x**4).mean() - 3) < bound(96)
    assert distance(x, np.vectorize(lambda t: (1 + math.erf(t / math.sqrt(2))) / 2)) < KS


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, "a"), (1, "a")), ((0, "a"), (0, "b")), ((1, "1"), (11, "")), ((0, "layer.1"), (0, "layer.10"))],
    ids=str,
)
def test_seeds_and_streams_are_independent(one, other):
    x, y = (whole_of(normal_block, (N,), *name) for name in (one, other))
    assert not np.isin(x, y).any()
    assert abs((x * y).mean()) < bound(1)


@pytest.mark.parametrize("shift", [1, 2, 400])
def test_neighbours_are_not_correlated(shift):
    x = whole_of(normal_block, (N // 400, 400)).ravel()
    assert abs((x[shift:] * x[:-shift]).sum() / N) < bound(1)


def test_the_same_name_gives_the_same_numbers():
    x = [whole_of(uniform_block, (4,), 5, "w").tobytes() for _ in range(2)]
    assert x[0] == x[1]
