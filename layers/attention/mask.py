"""The attention mask of a sequence that is cut: it says which keys of each rank a rank's queries see.

`Attention` makes an `AttentionMask` from the context. The ring asks it which keys of a rank another rank needs, and
which tiles of the scores to compute with them. It calls `Context` for padding, positions and documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.order import MOST_RUNS, runs
from colossal_mpi.layout import coords_of, rank_of
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Run = tuple[int, int]
"""First token and end of some consecutive tokens of the sequence."""

Box = tuple[slice, slice, slice]
"""Keys that some samples see: the samples, the rows of the block, and the place of the rows among all that are seen."""


@dataclass(frozen=True)
class Tile:
    """A tile of the scores: a range of this rank's queries, and a range of the keys that it has of one rank."""

    run: int
    """The number of the queries' run among the runs of this rank."""
    queries: slice
    """The range of the queries in this rank's block."""
    keys: slice
    """The range of the keys among those that `AttentionMask.rows` names, one range after the other."""
    causal: bool
    """True if a query sees only the keys at its own position and lower ones; otherwise it sees all."""
    padding: Block | None = None
    """Bool ``[b, keys]``, true for a key that counts; None: all count."""
    positions: tuple[Block, Block] | tuple[range, range] | None = None
    """Positions of queries and keys for a causal tile; None: their indices in the tile."""
    window: int | Block | None = None
    """Number of positions, up to its own, whose keys a query of a causal tile sees; an array ``[b, queries]`` has the
    number of each query. None: all."""


class AttentionMask:
    """The attention mask of this rank's queries over the keys of each rank of a ring.

    The runs of the sequence that two ranks hold are equal or disjoint. The keys that a run of queries sees in another
    run are therefore consecutive: from the start of the window, or of the document, of its first query to its last
    query. Only these keys are sent, and no tile of the scores is computed in vain. Positions are compared only where a
    tile has hidden keys, or where the context gives positions without documents.

    Parameters
    ----------
    x : DistArray, ``[b, s, ...]``
        The queries; only the axes of the ring cut s.
    causal : bool
        Whether a query sees only the keys of its own position and lower ones.
    ctx : Context
        Padding mask, positions, documents and order of the sequence.
    window : int, optional
        Number of positions, up to its own, whose keys a causal query sees; None: all.

    Raises
    ------
    OptionError
        If the context has documents and the attention is not causal.

    Notes
    -----
    **Communication:** the padding mask is gathered over the axes that cut s: ``b s`` bytes on each rank. Documents are
    known to all ranks.
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
        self._first = ctx.documents_of(x)
        self.samples = x.local.shape[0]
        if self._first is not None and not causal:
            raise OptionError("documents are kept apart by causal attention only: use causal=True, or no documents")
        positions = ctx.positions_of(x, whole=True)  # checked even where they do not count
        self._runs = [runs(ctx.order, *indices) for indices in self.ranges]
        split = (ctx.positions is None or self._first is not None) and max(map(len, self._runs)) <= MOST_RUNS
        self._positions = positions if causal and not split else None
        if self._positions is not None and self._first is not None:
            raise OptionError(
                f"with documents a rank may hold at most {MOST_RUNS} runs of consecutive tokens; the order of the "
                f"context has {max(map(len, self._runs))}: use the order of Parallelism.order"
            )
        self._split = causal and split
        self._seen = cache(self._find_seen)
        self.boxes = cache(self._find_boxes)
        self._windows = cache(self._find_windows)

    def runs_of(self, rank: int) -> list[slice]:
        """Return the ranges of a rank's block that are attended to one by one."""
        low, high = self.ranges[rank]
        if not self._split:
            return [slice(0, high - low)]
        return list(_ranges(end - first for first, end in self._runs[rank]))

    def rows(self, reader: int, source: int) -> list[slice]:
        """Return the ranges of the block of rank `source` whose keys some query of rank `reader` sees.

        Parameters
        ----------
        reader, source : int
            Ranks of the ring; of its own keys a rank takes all.

        Returns
        -------
        list of slice
            Ranges that are not empty, in the order of the block; the same on every rank of the ring.
        """
        low, high = self.ranges[source]
        if reader == source or not self._split:
            hidden = reader != source and self._is_hidden(reader, source)
            return [] if hidden or low == high else [slice(0, high - low)]
        starts = [start - tokens[0] for start, tokens in zip(self._starts(source), self._runs[source], strict=True)]
        return [slice(starts[j] + first, starts[j] + end) for j, (first, end) in self._seen(reader, source)]

    def _find_boxes(self, reader: int, source: int) -> list[Box] | None:
        """Return the part of `rows` that some query sees in each sample; None: every sample has the same.

        The keys of a run that a sample sees end with the run, since the queries of another rank come after all of it.
        They begin with the window, or the document, of the first query after the run.
        """
        if self._first is None or not len(self._first) or reader == source:
            return None
        found: list[Box] = []
        place = 0
        for j, (low, high) in self._seen(reader, source):
            query = min(first for first, end in self._runs[reader] if high <= first < end)
            reach = low if self.window is None else max(low, query - self.window + 1)
            lowest = np.clip(self._first[:, query], reach, high)
            cuts = [0, *(np.flatnonzero(np.diff(lowest)) + 1).tolist(), len(lowest)]
            start = self._starts(source)[j] - self._runs[source][j][0]
            for first, end in itertools.pairwise(cuts):
                token = int(lowest[first])
                if token < high:
                    rows = slice(start + token, start + high)
                    found.append((slice(first, end), rows, slice(place + token - low, place + high - low)))
            place += high - low
        return None if all(samples == slice(0, len(self._first)) for samples, *_ in found) else found

    def tiles(self, source: int) -> list[Tile]:
        """Return the tiles of this rank's queries and the keys of rank `source`, without tiles that are all hidden."""
        queries, rows = self.runs_of(self.rank), self.rows(self.rank, source)
        if not self._split:
            return self._whole(queries[0], source) if rows else []
        if source == self.rank:
            seen = list(enumerate(self._runs[source]))
            places = self.runs_of(source)
        else:
            seen = self._seen(self.rank, source)
            places = list(_ranges(part.stop - part.start for part in rows))
        found = []
        for (_, tokens), place, own in zip(seen, places, rows if source != self.rank else places, strict=True):
            for i, run in enumerate(self._runs[self.rank]):
                low, high = self._visible(run, tokens)
                if low < high:
                    keys, held = (_shifted(at, low - tokens[0], high - low) for at in (place, own))
                    padding = None if self._padding is None else self._padding[:, self._indices(source, held)]
                    found.append(Tile(i, queries[i], keys, *self._order(i, run, (low, high), padding)))
        return found

    def _starts(self, rank: int) -> list[int]:
        return [place.start for place in self.runs_of(rank)]

    def _find_seen(self, reader: int, source: int) -> list[tuple[int, Run]]:
        """Return the tokens of rank `source` that some query of another rank sees, each with the number of its run."""
        found: list[tuple[int, Run]] = []
        for j, keys in enumerate(self._runs[source]):
            visible = sorted(self._visible(run, keys) for run in self._runs[reader])
            for low, high in ((low, high) for low, high in visible if low < high):
                if found and found[-1][0] == j and low <= found[-1][1][1]:
                    low, high = found[-1][1][0], max(high, found.pop()[1][1])
                found.append((j, (low, high)))
        return found

    def _visible(self, queries: Run, keys: Run) -> Run:
        """Return the tokens of a run of keys that some query of a run sees, by causal order, window and documents."""
        return (max(keys[0], self._lowest(queries[0])), min(keys[1], queries[1])) if queries[0] < queries[1] else (0, 0)

    def _lowest(self, query: int, of: Any = min) -> int:
        """Return the lowest token that a query sees in some sample, or with ``of=max`` in every sample."""
        first = 0 if self._first is None or not len(self._first) else int(of(self._first[:, query]))
        return first if self.window is None else max(first, query - self.window + 1)

    def _order(
        self, i: int, queries: Run, keys: Run, padding: Block | None
    ) -> tuple[bool, Block | None, tuple[range, range] | None, int | Block | None]:
        """Return the fields `causal`, `padding`, `positions` and `window` of a tile of run `i` and some keys."""
        window = self._windows(i) if keys[0] < self._lowest(queries[1] - 1, max) else None
        if keys == queries:
            return True, padding, None, window
        if keys[1] <= queries[0] + 1 and window is None:
            return False, padding, None, None
        return True, padding, (range(*queries), range(*keys)), window

    def _find_windows(self, i: int) -> int | Block | None:
        """Return the window of the queries of run `i`, or with documents the window of each of them."""
        if self._first is None:
            return self.window
        queries = np.arange(*self._runs[self.rank][i])
        windows = queries + 1 - self._first[:, queries]
        return self.grid.xp.asarray(windows if self.window is None else np.minimum(windows, self.window))

    def _whole(self, queries: slice, source: int) -> list[Tile]:
        """Return one tile of two whole blocks."""
        keys = slice(0, self.ranges[source][1] - self.ranges[source][0])
        padding = None if self._padding is None else self._padding[:, self._indices(source, keys)]
        if self._positions is None:
            return [Tile(0, queries, keys, False, padding)]
        if self._is_hidden(self.rank, source):
            return []
        q, k = (self._positions[..., slice(*self.ranges[rank])] for rank in (self.rank, source))
        return [Tile(0, queries, keys, True, padding, (q, k), self.window)]

    def _is_hidden(self, reader: int, source: int) -> bool:
        """Return whether the positions hide all keys of one rank from all queries of another."""
        if self._positions is None:
            return False
        q, k = (self._positions[..., slice(*self.ranges[rank])] for rank in (reader, source))
        xp = backend.namespace(q)
        if 0 in (*q.shape, *k.shape) or bool(xp.min(k) > xp.max(q)):
            return True
        return self.window is not None and bool(int(xp.max(k)) <= int(xp.min(q)) - self.window)

    def _indices(self, source: int, rows: slice) -> slice:
        """Return rows of a rank's block as indices in s."""
        return _shifted(slice(0, 0), self.ranges[source][0] + rows.start, rows.stop - rows.start)


def _ranges(lengths: Iterable[int]) -> Iterable[slice]:
    """Return ranges of some lengths, one after the other."""
    return itertools.starmap(slice, itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def _shifted(place: slice, by: int, length: int) -> slice:
    """Return a range of some length that starts `by` after another one."""
    return slice(place.start + by, place.start + by + length)
