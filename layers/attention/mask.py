"""Which keys a query sees, where ranks hold parts of the sequence, in any order: what of it is to be attended to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.layer import Context
from colossal_mpi.layers.order import runs
from colossal_mpi.layers.positions import given_mask, given_positions
from colossal_mpi.layout import coords_of, rank_of
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

_RUNS = 4
"""Most stretches of a block that are attended to one by one; where there are more, positions are compared."""


@dataclass(frozen=True)
class Piece:
    """Some of a rank's queries and some keys of one block that they see."""

    row: int
    """Which of the stretches of the rank's queries."""
    queries: slice
    keys: slice
    causal: bool
    mask: Block | None = None
    positions: tuple[Block, Block] | None = None


class Sight:
    """What the queries of this rank see of the keys of each rank that cuts the sequence.

    Stretches of the sequence that two ranks hold are equal or disjoint, so that queries see all keys of a stretch, or
    none, or those of their own in a causal order: nothing is computed that is not needed, and no positions are compared
    unless they are given.

    Parameters
    ----------
    x : DistArray, ``[b, s, ...]``
        The queries, s cut by the axes of the ring alone.
    causal : bool
    ctx : Context
        With mask, positions and order of the sequence.

    **Communication:** a mask is gathered over the axes that cut s: ``b s`` bytes on each rank.
    """

    def __init__(self, x: DistArray, causal: bool, ctx: Context) -> None:
        self.grid, self.axes, self.causal = x.grid, x.grid.ordered(x.layout.dims[1]), causal
        sizes = {axis: x.grid.axes[axis] for axis in self.axes}
        self.rank, self.ranks = rank_of({axis: x.grid.coords[axis] for axis in sizes}, sizes), x.grid.extent(self.axes)
        places = [{**x.grid.coords, **coords_of(rank, sizes)} for rank in range(self.ranks)]
        self.spans = [x.layout.box(x.shape, x.grid.axes, place)[1] for place in places]
        """Of each rank of the ring: start and stop of its indices in s."""
        self.mask = given_mask(ctx, x, whole=True)
        positions = given_positions(ctx, x, whole=True)  # checked even where they do not count
        self._runs = [runs(ctx.order, *span) for span in self.spans]
        split = ctx.positions is None and max(map(len, self._runs)) <= _RUNS
        self._positions = positions if causal and not split else None
        self._split = causal and split

    def blocks(self, rank: int) -> list[slice]:
        """Return the stretches of a rank's block that are attended to one by one."""
        low, high = self.spans[rank]
        if not self._split:
            return [slice(0, high - low)]
        ends = itertools.accumulate((end - first for first, end in self._runs[rank]), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def pieces(self, source: int) -> list[Piece]:
        """Return what this rank attends to of the keys of rank `source`."""
        rows, columns, mask = self.blocks(self.rank), self.blocks(source), self._mask(source)
        if not self._split:
            return self._whole(rows[0], columns[0], mask, source)
        return [
            Piece(i, rows[i], columns[j], low == first, None if mask is None else mask[:, columns[j]])
            for i, (first, end) in enumerate(self._runs[self.rank])
            for j, (low, high) in enumerate(self._runs[source])
            if first < end and low < min(high, end)
        ]

    def _whole(self, rows: slice, columns: slice, mask: Block | None, source: int) -> list[Piece]:
        """Return one piece, or none if all its keys are hidden."""
        if self._positions is None:
            return [Piece(0, rows, columns, False, mask)]
        q, k = (self._positions[..., slice(*self.spans[rank])] for rank in (self.rank, source))
        xp = backend.namespace(q)
        hidden = 0 in (*q.shape, *k.shape) or bool(xp.min(k) > xp.max(q))
        return [] if hidden else [Piece(0, rows, columns, True, mask, (q, k))]

    def _mask(self, source: int) -> Block | None:
        return None if self.mask is None else self.mask[:, slice(*self.spans[source])]
