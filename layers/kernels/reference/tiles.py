"""Tiles of the scores of attention (some samples, groups of heads, queries and keys), and the attention mask.

``attention`` works tile by tile, and the flop counts of ``layers.analysis`` call `attention_scores`. The r query heads
of a group share its keys, so that their queries are the columns of one matrix of scores, ``k [b, g, t, d]`` times ``q
[b, g, d, r s]``. Keys are its rows, because maxima over columns are faster than maxima over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.layout import part
from colossal_mpi.platform.backend import Block, namespace

Positions = tuple[Block, Block] | tuple[range, range] | None
"""Positions of the queries, ``[s]`` or ``[b, s]``, and of the keys, ``[t]`` or ``[b, t]``, or the two ranges of
consecutive positions. None: 0, 1, 2, ..."""

LENGTH = 256
"""Greatest number of queries, and of keys, of a tile."""
LEAST = 64
"""Number of queries, or keys, above which a causal tile is cut in two, so that one tile is skipped."""
SCORES = 1 << 18
"""Greatest number of scores of a tile of several queries."""


@dataclass(frozen=True)
class Tile:
    """A range of samples, of groups of heads and of queries."""

    samples: slice
    groups: slice
    queries: slice

    def of_queries(self, x: Block) -> Block:
        """Return the part ``[b, g, r s, d]`` of ``[b, s, g, r, d]``."""
        xp = namespace(x)
        x = xp.permute_dims(x[self.samples, self.queries, self.groups, :, :], (0, 2, 3, 1, 4))
        b, g, r, s, d = x.shape
        return wide(xp.reshape(x, (b, g, r * s, d)))

    def put_queries(self, x: Block, part: Block) -> None:
        """Put a part ``[b, g, r s, d]`` into ``[b, s, g, r, d]``."""
        xp, (b, g, n, d), r = namespace(x), part.shape, x.shape[3]
        part = xp.permute_dims(xp.reshape(part, (b, g, r, n // r, d)), (0, 3, 1, 2, 4))
        x[self.samples, self.queries, self.groups, :, :] = xp.astype(part, x.dtype, copy=False)

    def of_statistics(self, x: Block) -> Block:
        """Return the part ``[2, b, g, 1, r s]`` of ``[2, b, g, r, s]``."""
        x = x[:, self.samples, self.groups, :, self.queries]
        _, b, g, r, s = x.shape
        return namespace(x).reshape(x, (2, b, g, 1, r * s))

    def put_statistics(self, x: Block, part: Block) -> None:
        """Put a part ``[2, b, g, 1, r s]`` into ``[2, b, g, r, s]``."""
        (_, b, g, _, n), r = part.shape, x.shape[3]
        x[:, self.samples, self.groups, :, self.queries] = namespace(x).reshape(part, (2, b, g, r, n // r))

    def of_keys(self, x: Block, keys: slice) -> Block:
        """Return the part ``[b, g, t, d]`` of ``[b, t, g, d]``."""
        return wide(namespace(x).permute_dims(x[self.samples, keys, self.groups, :], (0, 2, 1, 3)))

    def put_keys(self, x: Block, keys: slice, part: Block) -> None:
        """Put a part of keys or values into its place.

        Parameters
        ----------
        x : array
            The whole ``[b, t, g, d]``, which is changed in place.
        keys : slice
            The keys of the part.
        part : array
            The values ``[b, g, t, d]``.
        """
        xp = namespace(x)
        x[self.samples, keys, self.groups, :] = xp.astype(xp.permute_dims(part, (0, 2, 1, 3)), x.dtype, copy=False)


def tiles(q: Block, k: Block, causal: bool) -> tuple[Iterator[list[Tile]], list[slice]]:
    """Return the tiles of queries ``[b, s, g, r, d]`` and the parts of keys ``[b, t, g, d]``.

    Returns
    -------
    iterator of list of Tile
        The tiles of queries, one list for each choice of samples and groups.
    list of slice
        The parts of the keys.
    """
    (b, s, g, r, _), t = q.shape, k.shape[1]
    height, width = _sides(s, t, r, causal)
    groups = _groups(r * height * width)
    queries = parts(s, height)
    found = (
        [Tile(samples, some, rows) for rows in queries]
        for samples in parts(b, max(1, groups // g))
        for some in parts(g, groups)
    )
    return found, parts(t, width)


def _groups(scores: int) -> int:
    """Return the greatest number of groups in a tile, over all its samples, if each group has this number of scores."""
    return max(1, SCORES // scores)


def largest(b: int, s: int, g: int, r: int, t: int, causal: bool) -> int:
    """Return an upper bound of the number of scores of the largest tile.

    Parameters
    ----------
    b : int
        Number of samples.
    s : int
        Number of queries.
    g : int
        Number of groups of heads.
    r : int
        Query heads of a group.
    t : int
        Number of keys.
    causal : bool
        Whether a query sees only keys at its own position and lower ones.

    Returns
    -------
    int
        The bound, in elements.
    """
    height, width = _sides(s, t, r, causal)
    return min(b * g, _groups(r * height * width)) * r * height * width


Window = int | Block | None
"""Number of positions, up to its own, whose keys a query sees; an array ``[b, s]`` of the number of each query."""


def attention_scores(
    s: int, t: int, r: int = 1, causal: bool = True, window: int | None = None, offset: int = 0
) -> int:
    """Return how many scores of a head attention computes, at consecutive positions.

    A tile is computed whole if one of its queries sees one of its keys.

    Parameters
    ----------
    s : int
        Number of queries.
    t : int
        Number of keys.
    r : int
        Query heads of a group.
    causal : bool
        Whether a query sees only keys at its own position and lower ones.
    window : int, optional
        Number of positions, up to its own, whose keys a causal query sees; None: all.
    offset : int
        Position of the first query less the position of the first key.

    Returns
    -------
    int
        Number of scores.
    """
    height, width = _sides(s, t, r, causal)
    pairs = ((rows, keys) for rows in parts(s, height) for keys in parts(t, width))
    return sum(
        (rows.stop - rows.start) * (keys.stop - keys.start)
        for rows, keys in pairs
        if not causal
        or _seen(
            (rows.start + offset, rows.stop + offset - 1),
            (keys.start, keys.stop - 1),
            None if window is None else rows.start + offset - window + 1,
        )
    )


def _sides(s: int, t: int, r: int, causal: bool) -> tuple[int, int]:
    """Return the most queries and the most keys of a tile."""
    width = _length(t, causal)
    return min(_length(s, causal), max(1, SCORES // (r * width))), width


def _length(n: int, causal: bool) -> int:
    """Return the most queries or keys of a tile. A causal order has two tiles at least, so that one is skipped."""
    return min(n, LENGTH, max(LEAST, -(-n // 2)) if causal else n)


def parts(n: int, most: int) -> list[slice]:
    """Return n indices in balanced ranges of `most` at most."""
    count = -(-n // most)
    return [slice(*part(n, count, i)) for i in range(count)]


def _seen(queries: tuple[int, int], keys: tuple[int, int], lowest: int | None) -> bool:
    """Return whether a causal query may see a key, by their least and greatest positions and the lowest one seen."""
    return keys[0] <= queries[1] and (lowest is None or keys[1] >= lowest)


@dataclass(frozen=True)
class AttentionMask:
    """The attention mask: it hides keys from queries by causal order, window, key mask and positions."""

    causal: bool
    mask: Block | None
    positions: Positions
    window: Window

    def ranges(self, tile: Tile, keys: Sequence[slice]) -> list[slice]:
        """Return the ranges of keys in which some query of a tile may see some key."""
        if not self.causal:
            return list(keys)
        queries, lowest = self._ends(0, tile, tile.queries), self._lowest(tile, min)
        return [x for x in keys if _seen(queries, self._ends(1, tile, x), lowest)]

    def hide(self, scores: Block, tile: Tile, keys: slice) -> Block:
        """Set scores to minus infinity where the key is hidden.

        Parameters
        ----------
        scores : array
            The scores ``[b, g, t, r s]`` of a tile, which are changed in place.
        tile : Tile
            The queries.
        keys : slice
            The keys.

        Returns
        -------
        array
            The scores.
        """
        xp, (b, g, t, n) = namespace(scores), scores.shape
        s = tile.queries.stop - tile.queries.start
        for bias in self._biases(scores, tile, keys):
            scores = xp.reshape(scores, (b, g, t, n // s, s))
            scores += bias
        return xp.reshape(scores, (b, g, t, n))

    def _biases(self, scores: Block, tile: Tile, keys: slice) -> Iterator[Block]:
        """Yield terms to add to scores ``[b, g, t, r, s]``, each of fewer elements."""
        xp = namespace(scores)
        shown, hidden = (xp.asarray(value, dtype=scores.dtype) for value in (0.0, -math.inf))
        for later in self._orders(tile, keys):
            q, k = (self._at(side, tile, which, scores) for side, which in enumerate((tile.queries, keys)))
            yield xp.where(later(k[:, :, None], q[:, None, :]), hidden, shown)[:, None, :, None, :]
        if self.mask is not None:
            yield xp.where(self.mask[tile.samples, keys], shown, hidden)[:, None, :, None, None]

    def _orders(self, tile: Tile, keys: slice) -> Iterator[Callable[[Block, Block], Block]]:
        """Yield the comparisons of key and query positions that hide some key of a tile: its future, its past."""
        if not self.causal:
            return
        (first, _), (low, high) = self._ends(0, tile, tile.queries), self._ends(1, tile, keys)
        if high > first:
            yield lambda k, q: k > q
        highest = self._lowest(tile, max)
        if highest is not None and low < highest:
            window = self.window if isinstance(self.window, int) else self._windows(tile)[:, None, :]
            yield lambda k, q: k <= q - window

    def _windows(self, tile: Tile) -> Block:
        """Return the windows ``[b, n]`` of a tile's queries, where each query has its own."""
        assert not isinstance(self.window, int | None)
        return self.window[tile.samples, tile.queries]

    def _lowest(self, tile: Tile, of: Callable[[int, int], int]) -> int | None:
        """Return the least (``of=min``) or greatest (``max``) of the lowest positions that queries of a tile see."""
        if self.window is None:
            return None
        if isinstance(self.window, int):
            return of(*self._ends(0, tile, tile.queries)) - self.window + 1
        windows = self._windows(tile)
        lowest = self._at(0, tile, tile.queries, windows) - windows + 1
        xp = namespace(windows)
        return int((xp.min if of is min else xp.max)(lowest))

    def _ends(self, side: int, tile: Tile, which: slice) -> tuple[int, int]:
        """Return the least and the greatest position of some queries (side 0) or keys (1)."""
        positions = range(which.stop) if self.positions is None else self.positions[side]
        if isinstance(positions, range):
            return positions[which.start], positions[which.stop - 1]
        at = self._at(side, tile, which, positions)
        xp = namespace(at)
        return int(xp.min(at)), int(xp.max(at))

    def _at(self, side: int, tile: Tile, which: slice, beside: Block) -> Block:
        """Return positions ``[1 or b, n]``."""
        positions = range(which.stop) if self.positions is None else self.positions[side]
        xp = namespace(beside)
        if isinstance(positions, range):
            return xp.arange(positions[which.start], positions[which.stop - 1] + 1)[None, :]
        # positions may be unsigned, and a window goes below 0
        positions = xp.astype(positions, xp.int64, copy=False)
        return positions[tile.samples, which] if positions.ndim == 2 else positions[None, which]
