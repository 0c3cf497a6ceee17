"""How the axes of one of our weights lie in tensors of other names: in another order, merged, or stacked.

``Entry("qkv.weight", "htad", ("q.weight", "k.weight", "v.weight"), "(ad)h")`` says that our ``[h, t, a, d]`` stands
in three tensors ``[a d, h]``. Letters in brackets are merged into one dim, ``1`` is a dim of size 1, and the letter of
ours that theirs lack counts their tensors. An `Entry` cuts a box of our array into pieces, each a box of one tensor of
theirs: reading copies them one way, writing the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from colossal_mpi.layout import Box, box_shape

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A box of our array and the box of a tensor of theirs that holds its elements."""

    name: str
    ours: Box
    theirs: Box
    lengths: tuple[int, ...]
    """Of their letters, merged dims taken apart."""
    order: tuple[int, ...]
    """The place among them of each letter of ours that they have."""

    def from_theirs(self, values: np.ndarray) -> np.ndarray:
        """Return the elements of their box in the shape of ours."""
        return values.reshape(self.lengths).transpose(self.order).reshape(box_shape(self.ours))

    def to_theirs(self, values: np.ndarray) -> np.ndarray:
        """Return the elements of our box in the shape of theirs: the inverse of `from_theirs`."""
        apart = values.reshape([self.lengths[place] for place in self.order])
        return apart.transpose(np.argsort(self.order)).reshape(box_shape(self.theirs))


@dataclass(frozen=True)
class Entry:
    """One weight of ours and the tensors of theirs that hold it.

    Parameters
    ----------
    ours : str
        Name of our parameter; ``{i}`` is the number of a block.
    letters : str
        A letter for each of its dims.
    theirs : tuple of str
        Names of their tensors, one for each index of the letter that `dims` lacks, or one.
    dims : str
        The dims of each of them.
    """

    ours: str
    letters: str
    theirs: tuple[str, ...]
    dims: str

    @property
    def groups(self) -> list[str]:
        """The letters of each dim of theirs."""
        return [dim.strip("()1") for dim in re.findall(r"\([a-z]+\)|[a-z1]", self.dims)]

    def of_block(self, i: int) -> Entry:
        """Return the entry of block `i`."""
        return Entry(self.ours.format(i=i), self.letters, tuple(name.format(i=i) for name in self.theirs), self.dims)

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of each tensor of theirs for that of our weight."""
        sizes = dict(zip(self.letters, ours, strict=True))
        return tuple(math.prod(sizes[x] for x in group) for group in self.groups)

    def pieces(self, shape: Sequence[int], box: Box) -> Iterator[Piece]:
        """Yield the pieces of a box of our weight, whose global shape is given: few, and contiguous along each dim."""
        if 0 in box_shape(box):
            return
        sizes, groups = dict(zip(self.letters, shape, strict=True)), self.groups
        ranges = dict(zip(self.letters, box, strict=True))
        flat = "".join(groups)
        order = tuple(flat.index(x) for x in self.letters if x in flat)
        stack = "".join(x for x in self.letters if x not in flat)
        stretches = [list(_stretches(group, sizes, ranges)) for group in groups]
        for number in range(*ranges[stack]) if stack else (0,):
            for chosen in product(*stretches):
                held = {stack: (number, number + 1)}
                for _, letters in chosen:
                    held |= letters
                lengths = tuple(held[x][1] - held[x][0] for x in flat)
                ours, theirs = tuple(held[x] for x in self.letters), tuple(stretch for stretch, _ in chosen)
                yield Piece(self.theirs[number], ours, theirs, lengths, order)


def _stretches(
    group: str, sizes: Mapping[str, int], ranges: Mapping[str, Range]
) -> Iterator[tuple[Range, dict[str, Range]]]:
    """Yield the contiguous stretches of a merged dim that ranges of its letters cover, and the ranges of each."""
    inner = math.prod(sizes[x] for x in group[1:])
    if not group:
        yield (0, 1), {}
    elif all(ranges[x] == (0, sizes[x]) for x in group[1:]):
        start, stop = ranges[group[0]]
        yield (start * inner, stop * inner), {x: ranges[x] for x in group}
    else:
        for i in range(*ranges[group[0]]):
            for (start, stop), rest in _stretches(group[1:], sizes, ranges):
                yield (i * inner + start, i * inner + stop), {group[0]: (i, i + 1), **rest}


def one(ours: str, letters: str, theirs: str, dims: str | None = None) -> Entry:
    """Return the entry of a weight that stands in one tensor, by default with the same dims."""
    return Entry(ours, letters, (theirs,), dims or letters)


def norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    """Return the entries of gain and bias of a norm."""
    return one(f"{ours}.gain", "h", f"{theirs}.weight"), one(f"{ours}.bias", "h", f"{theirs}.bias")


def linear(ours: str, letters: str, theirs: Sequence[str], dims: str, summed: str = "h") -> tuple[Entry, Entry]:
    """Return the entries of weight and bias of a product that sums over the letters `summed`, which its bias lacks."""
    weights, biases = (tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias"))
    kept, left = ("".join(x for x in text if x not in summed).replace("()", "") for text in (letters, dims))
    return Entry(f"{ours}.weight", letters, weights, dims), Entry(f"{ours}.bias", kept, biases, left)
