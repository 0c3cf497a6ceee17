"""The attention mask of a sequence that is cut: it says which keys of each rank a rank's queries see.

`Attention` makes an `AttentionMask` from the context, and the ring asks it which tiles of the scores to compute for the
keys of each rank. It calls `Context` for padding and positions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context, runs
from colossal_mpi.layout import coords_of, rank_of
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

_MOST_RUNS = 4
"""Greatest number of runs into which a block is split; a block of more runs compares positions instead."""


@dataclass(frozen=True)
class Tile:
    """A tile of the scores: a range of this rank's queries and a range of the keys of one rank's block."""

    run: int
    """The number of the queries' run among the runs of this rank."""
    queries: slice
    """The range of the queries in this rank's block."""
    keys: slice
    """The range of the keys in the block of the rank that holds them."""
    causal: bool
    """True if a query sees only the keys at its own position and lower ones; otherwise it sees all."""
    padding: Block | None = None
    """Bool ``[b, keys]``, true for a key that counts; None: all count."""
    positions: tuple[Block, Block] | tuple[range, range] | None = None
    """Positions of queries and keys for a causal tile; None: their indices in the tile."""
    window: int | None = None
    """Number of positions, up to its own, whose keys a query of a causal tile sees; None: all."""


class AttentionMask:
    """The attention mask of this rank's queries over the keys of each rank of a ring.

    The runs of the sequence that two ranks hold are equal or disjoint. In causal attention a run of queries therefore
    sees all keys of another run or none of them, and in its own run the keys up to its position. No score is computed
    in vain, and positions are compared only if the context gives them, or at the edge of a window.

    Parameters
    ----------
    x : DistArray, ``[b, s, ...]``
        The queries; only the axes of the ring cut s.
    causal : bool
        Whether a query sees only the keys of its own position and lower ones.
    ctx : Context
        Padding mask, positions and order of the sequence.
    window : int, optional
        Number of positions, up to its own, whose keys a causal query sees; None: all.

    Notes
    -----
    **Communication:** the padding mask is gathered over the axes that cut s: ``b s`` bytes on each rank.
    """

    def __init__(self, x: DistArray, causal: bool, ctx: Context, window: int | None = None) -> None:
        self.window = window
        self.grid, self.axes, self.causal = x.grid, x.grid.ordered(x.layout.dims[1]), causal
        sizes = {axis: x.grid.axes[axis] for axis in self.axes}
        self.rank, self.ranks = rank_of({axis: x.grid.coords[axis] for axis in sizes}, sizes), x.grid.extent(self.axes)
        coords = [{**x.grid.coords, **coords_of(rank, sizes)} for rank in range(self.ranks)]
        self.ranges = [x.layout.box(x.shape, x.grid.axes, at)[1] for at in coords]
        """For each rank of the ring, the start and stop of its indices in s."""
        # M[B_row, S_seq] -> M[B_row, S]: allgather over the ring
        self._padding = ctx.mask_of(x, whole=True)
        positions = ctx.positions_of(x, whole=True)  # checked even where they do not count
        self._runs = [runs(ctx.order, *indices) for indices in self.ranges]
        split = ctx.positions is None and max(map(len, self._runs)) <= _MOST_RUNS
        self._positions = positions if causal and not split else None
        self._split = causal and split

    def runs_of(self, rank: int) -> list[slice]:
        """Return the ranges of a rank's block that are attended to one by one."""
        low, high = self.ranges[rank]
        if not self._split:
            return [slice(0, high - low)]
        ends = itertools.accumulate((end - first for first, end in self._runs[rank]), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def tiles(self, source: int) -> list[Tile]:
        """Return the tiles of this rank's queries and the keys of rank `source`, without tiles that are all hidden."""
        queries, keys, padding = self.runs_of(self.rank), self.runs_of(source), self._padding_of(source)
        if not self._split:
            return self._whole(queries[0], keys[0], padding, source)
        return [
            Tile(i, queries[i], keys[j], *self._order(run, of_keys, None if padding is None else padding[:, keys[j]]))
            for i, run in enumerate(self._runs[self.rank])
            for j, of_keys in enumerate(self._runs[source])
            if self._sees(run, of_keys)
        ]

    def _sees(self, queries: tuple[int, int], keys: tuple[int, int]) -> bool:
        """Return whether some query of a run sees some key of a run, by causal order and window."""
        (first, end), (low, high) = queries, keys
        return first < end and low < min(high, end) and (self.window is None or high > first - self.window + 1)

    def _order(
        self, queries: tuple[int, int], keys: tuple[int, int], padding: Block | None
    ) -> tuple[bool, Block | None, tuple[range, range] | None, int | None]:
        """Return the fields `causal`, `padding`, `positions` and `window` of a tile of two runs."""
        if keys[0] == queries[0]:
            return True, padding, None, self.window
        if self.window is None or keys[0] > queries[1] - 1 - self.window:
            return False, padding, None, None
        return True, padding, (range(*queries), range(*keys)), self.window

    def _whole(self, queries: slice, keys: slice, padding: Block | None, source: int) -> list[Tile]:
        """Return one tile of two whole blocks, or none if all its keys are hidden."""
        if self._positions is None:
            return [Tile(0, queries, keys, False, padding)]
        q, k = (self._positions[..., slice(*self.ranges[rank])] for rank in (self.rank, source))
        xp = backend.namespace(q)
        hidden = 0 in (*q.shape, *k.shape) or bool(xp.min(k) > xp.max(q))
        if self.window is not None and not hidden:
            hidden = bool(int(xp.max(k)) <= int(xp.min(q)) - self.window)
        return [] if hidden else [Tile(0, queries, keys, True, padding, (q, k), self.window)]

    def _padding_of(self, source: int) -> Block | None:
        return None if self._padding is None else self._padding[:, slice(*self.ranges[source])]
