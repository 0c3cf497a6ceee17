"""Ranks in a ring that pass one another their rows of a matrix, one panel at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from colossal_mpi import comm
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, bounds, coords_of, rank_of
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Span = tuple[int, int]


@dataclass(frozen=True)
class Ring:
    """The ranks that cut n rows over axes of a grid, in the order of the rows."""

    grid: Grid
    rows: Axes
    n: int

    @property
    def size(self) -> int:
        """The number of blocks of rows."""
        return self.grid.extent(self.rows)

    @property
    def me(self) -> int:
        """The block of this rank."""
        return self.block_of(self.grid.coords)

    def block_of(self, coords: Mapping[str, int]) -> int:
        """Return the number of the block of rows of the rank at `coords`."""
        return rank_of(coords, {axis: self.grid.axes[axis] for axis in self.rows})

    def _coords(self, block: int) -> dict[str, int]:
        return coords_of(block, {axis: self.grid.axes[axis] for axis in self.rows})

    def span(self, block: int) -> Span:
        """Return the rows of a block."""
        return bounds(self.n, self.rows, self.grid.axes, self._coords(block))

    def rank(self, block: int) -> int:
        """Return the rank, in the group of the ring, that has a block."""
        return rank_of(self._coords(block), {axis: self.grid.axes[axis] for axis in self.grid.ordered(self.rows)})

    def fetch(self, stored: Block, other: int, theirs: Span | None = None, mine: Span | None = None) -> Block:
        """Return the rows of block `other`, while the rank as far on the other side gets those of this rank.

        All columns or the columns ``theirs``, and to that rank the columns ``mine``. Collective over the ring, with one
        distance on all ranks.

        **Communication:** one all_to_all in which each rank receives one panel.
        """
        xp, to = backend.namespace(stored), (2 * self.me - other) % self.size
        (low, high), (first, last) = theirs or (0, stored.shape[1]), mine or (0, stored.shape[1])
        start, stop = self.span(other)
        shape = (stop - start, high - low)
        counts, expected = [0] * self.size, [0] * self.size
        counts[self.rank(to)], expected[self.rank(other)] = stored.shape[0] * (last - first), math.prod(shape)
        send = xp.reshape(stored[:, first:last], (-1,))
        return xp.reshape(comm.all_to_all(send, self.grid, self.rows, counts, expected), shape)
