"""The boxes of a weight in Hugging Face's tensors equal NumPy's reshape and transpose of the whole weight."""

import itertools

import numpy as np
import pytest

from colossal_mpi.layers.models.huggingface.architecture import WeightMap
from colossal_mpi.layout import index_of, slices

SIZES = {"h": 5, "t": 3, "a": 4, "d": 2, "f": 7, "g": 2, "r": 3, "e": 2}
MAPS = [
    WeightMap("w", "fh", ("w",), "fh"),
    WeightMap("w", "hf", ("w",), "fh"),
    WeightMap("w", "htad", ("w",), "h(tad)"),
    WeightMap("w", "tad", ("w",), "(tad)"),
    WeightMap("w", "adh", ("w",), "h(ad)"),
    WeightMap("w", "htad", ("q", "k", "v"), "(ad)h"),
    WeightMap("w", "hgrd", ("w",), "(grd)h"),
    WeightMap("w", "tgd", ("q", "k", "v"), "(gd)"),
    WeightMap("w", "dgrh", ("w",), "hdgr"),
    WeightMap("w", "fh", ("w",), "1fh"),
    WeightMap("w", "h", ("w",), "11h"),
    WeightMap("w", "ehtf", ("{e}.q", "{e}.k", "{e}.v"), "fh"),
    WeightMap("w", "efh", ("w.{e}",), "hf"),
]


def theirs(weight, whole):
    """Return Hugging Face's tensors by name, given our whole weight."""
    flat = "".join(weight.groups)
    stack = [x for x in weight.letters if x not in flat]
    order = [weight.letters.index(x) for x in (*stack, *flat)]
    names = weight.names(whole.shape)
    moved = whole.transpose(order).reshape(len(names), *weight.shape(whole.shape))
    return dict(zip(names, moved, strict=True))


def boxes(shape, rng):
    yield tuple((0, n) for n in shape)
    for _ in range(20):
        yield tuple(tuple(sorted(rng.integers(0, n + 1, 2))) for n in shape)


@pytest.mark.parametrize("weight", MAPS, ids=lambda e: f"{e.letters}-{e.dims}")
def test_pieces_are_the_elements_of_the_box_in_both_directions(weight):
    rng = np.random.default_rng(0)
    shape = tuple(SIZES[x] for x in weight.letters)
    whole = rng.standard_normal(shape)
    tensors = theirs(weight, whole)
    for box in boxes(shape, rng):
        block, written = (
            np.full([b - a for a, b in box], np.nan),
            {n: np.zeros(t.shape, int) for n, t in tensors.items()},
        )
        for pair in weight.box_pairs(shape, box):
            values = tensors[pair.name][index_of(pair.theirs)]
            block[slices(pair.ours, box)] = pair.from_theirs(values)
            assert np.array_equal(pair.to_theirs(whole[index_of(pair.ours)]), values)
            written[pair.name][index_of(pair.theirs)] += 1
        assert np.array_equal(block, whole[index_of(box)])
        assert max(t.max() for t in written.values()) <= 1
        assert sum(t.sum() for t in written.values()) == block.size


def test_what_is_contiguous_is_one_piece():
    weight = MAPS[2]
    shape = tuple(SIZES[x] for x in weight.letters)
    for whole in itertools.product([True, False], repeat=2):
        heads = (0, 4) if whole[1] else (1, 3)
        box = ((1, 4), (0, 3) if whole[0] else (1, 2), heads, (0, 2))
        assert len(list(weight.box_pairs(shape, box))) == (3 if whole == (True, False) else 1)


def test_of_block_names_ours_and_theirs():
    weight = WeightMap("blocks.{i}.w", "hf", ("h.{i}.w",), "hf").of_block(7)
    assert (weight.ours, weight.theirs) == ("blocks.7.w", ("h.7.w",))
