"""Pieces of a weight in tensors of other names, against NumPy's reshape and transpose of the whole."""

import itertools

import numpy as np
import pytest

from colossal_mpi.layers.models.huggingface.axes import Entry
from colossal_mpi.layout import index_of, slices

SIZES = {"h": 5, "t": 3, "a": 4, "d": 2, "f": 7, "g": 2, "r": 3}
ENTRIES = [
    Entry("w", "fh", ("w",), "fh"),
    Entry("w", "hf", ("w",), "fh"),
    Entry("w", "htad", ("w",), "h(tad)"),
    Entry("w", "tad", ("w",), "(tad)"),
    Entry("w", "adh", ("w",), "h(ad)"),
    Entry("w", "htad", ("q", "k", "v"), "(ad)h"),
    Entry("w", "hgrd", ("w",), "(grd)h"),
    Entry("w", "tgd", ("q", "k", "v"), "(gd)"),
    Entry("w", "dgrh", ("w",), "hdgr"),
    Entry("w", "fh", ("w",), "1fh"),
    Entry("w", "h", ("w",), "11h"),
]


def theirs(entry, whole):
    """Return their tensors by name, of the whole of ours."""
    flat = "".join(entry.groups)
    stack = [x for x in entry.letters if x not in flat]
    order = [entry.letters.index(x) for x in (*stack, *flat)]
    moved = whole.transpose(order).reshape(len(entry.theirs), *entry.shape(whole.shape))
    return dict(zip(entry.theirs, moved, strict=True))


def boxes(shape, rng):
    yield tuple((0, n) for n in shape)
    for _ in range(20):
        yield tuple(tuple(sorted(rng.integers(0, n + 1, 2))) for n in shape)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.letters}-{e.dims}")
def test_pieces_are_the_elements_of_the_box_in_both_directions(entry):
    rng = np.random.default_rng(0)
    shape = tuple(SIZES[x] for x in entry.letters)
    whole = rng.standard_normal(shape)
    tensors = theirs(entry, whole)
    for box in boxes(shape, rng):
        block, written = (
            np.full([b - a for a, b in box], np.nan),
            {n: np.zeros(t.shape, int) for n, t in tensors.items()},
        )
        for piece in entry.pieces(shape, box):
            values = tensors[piece.name][index_of(piece.theirs)]
            block[slices(piece.ours, box)] = piece.from_theirs(values)
            assert np.array_equal(piece.to_theirs(whole[index_of(piece.ours)]), values)
            written[piece.name][index_of(piece.theirs)] += 1
        assert np.array_equal(block, whole[index_of(box)])
        assert max(t.max() for t in written.values()) <= 1
        assert sum(t.sum() for t in written.values()) == block.size


def test_what_is_contiguous_is_one_piece():
    entry = ENTRIES[2]
    shape = tuple(SIZES[x] for x in entry.letters)
    for whole in itertools.product([True, False], repeat=2):
        heads = (0, 4) if whole[1] else (1, 3)
        box = ((1, 4), (0, 3) if whole[0] else (1, 2), heads, (0, 2))
        assert len(list(entry.pieces(shape, box))) == (3 if whole == (True, False) else 1)


def test_of_block_names_ours_and_theirs():
    entry = Entry("blocks.{i}.w", "hf", ("h.{i}.w",), "hf").of_block(7)
    assert (entry.ours, entry.theirs) == ("blocks.7.w", ("h.7.w",))
