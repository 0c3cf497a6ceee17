"""Ring attention: keys and values travel round the ranks that cut the sequence, which attend to one block at a time.

`Attention` and `GroupedAttention` call `attend` and `attend_backward` for the blocks of a rank; where no axis cuts the
sequence the ring has one rank and nothing is sent. Both call the attention kernels of the grid and
the exchanges of `colossal_mpi.comm`.

Each rank keeps its queries. In step t it attends to the keys and values of the rank t places before it, while the
blocks of the next step arrive. In the backward pass the cotangents of keys and values follow their blocks, each rank
adds its part, and the last message brings them home. No rank holds an array of the length of the sequence, except the
padding mask and positions that are given whole.

References
----------
Liu, Zaharia, Abbeel: Ring attention with blockwise transformers for near-infinite context, 2023. Milakov & Gimelshein:
Online normalizer calculation for softmax, 2018 (how parts are merged).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from colossal_mpi.comm import Pending, progress, start_exchange
from colossal_mpi.grid import Grid
from colossal_mpi.layers import kernels
from colossal_mpi.layers.attention.mask import AttentionMask, Tile
from colossal_mpi.layers.kernels import wide
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Blocks = tuple[Block, Block]
_KEYS_AND_VALUES, _COTANGENTS = 0, 1
"""Streams of messages; messages of one stream arrive in the order in which they are sent."""


def attend(q: Block, kv: Blocks, mask: AttentionMask) -> Blocks:
    """Return the attention of this rank's queries to all keys, and its statistics.

    The parts are merged in the order of the ring, from this rank's own keys on.

    Parameters
    ----------
    q : array, ``[b, n, a, d]``
        This rank's queries.
    kv : pair of array, ``[b, n, g, d]``
        This rank's keys and values, contiguous if the ring has other ranks.
    mask : AttentionMask
        The attention mask of the queries.

    Returns
    -------
    out : array, ``[b, n, a, d]``
        The outputs, in the dtype of q.
    statistics : array, ``[2, b, a, n, 1]``
        Peaks and sums of the scores, as the kernel ``attention`` returns them.

    Notes
    -----
    **Communication:** messages round the ring of c ranks: the keys and values of all others, ``2 (c - 1) b n g d``
    words received where blocks are equal.
    """
    queries = mask.runs_of(mask.rank)
    parts: list[Blocks | None] = [None] * len(queries)
    # Q[B, S_seq, A, D] . K[B, S, G, D]^T -> scores; softmax(scores) . V[B, S, G, D] -> O[B, S_seq, A, D],
    # with the keys and values of one rank of seq after the other
    for source, block in _around(kv, mask):
        for tile in mask.tiles(source):
            parts[tile.run] = _merge(parts[tile.run], _attend_tile(q, block, tile, mask.grid), mask.grid)
            _progress(mask)
    unseen = _attend_tile(q, kv, Tile(0, slice(None), slice(0), False), mask.grid) if None in parts else (q, q)
    return _join([part or _take_rows(unseen, rows) for part, rows in zip(parts, queries, strict=True)], q)


def _attend_tile(q: Block, kv: Blocks, tile: Tile, grid: Grid) -> Blocks:
    """Return the attention of a tile's queries to its keys alone."""
    k, v = (x[:, tile.keys, ...] for x in kv)
    attention = kernels.of(grid).attention
    return attention(q[:, tile.queries, ...], k, v, tile.causal, tile.padding, tile.positions, tile.window)


def _merge(before: Blocks | None, part: Blocks, grid: Grid) -> Blocks:
    """Return the attention to two parts of the keys together; 16-bit outputs are summed in float32."""
    if before is None:
        return part
    return kernels.of(grid).attention_merge((wide(before[0]), before[1]), part)


def _take_rows(pair: Blocks, rows: slice) -> Blocks:
    """Return outputs and statistics of some queries."""
    return pair[0][:, rows, ...], pair[1][:, :, :, rows, :]


def _join(parts: Sequence[Blocks], q: Block) -> Blocks:
    """Return the outputs, in the dtype of q, and the statistics of all runs of the queries in one array each."""
    xp, (outs, statistics) = backend.namespace(q), zip(*parts, strict=True)
    if len(parts) == 1:
        return xp.astype(outs[0], q.dtype, copy=False), statistics[0]
    return xp.astype(xp.concat(outs, axis=1), q.dtype, copy=False), xp.concat(statistics, axis=3)


def attend_backward(
    do: Block, q: Block, kv: Blocks, out: Block, statistics: Block, mask: AttentionMask
) -> tuple[Block, Block, Block]:
    """Return the cotangents of this rank's queries, keys and values.

    Parameters
    ----------
    do : array, ``[b, n, a, d]``
        The cotangent of the outputs of this rank's queries.
    q : array, ``[b, n, a, d]``
        This rank's queries.
    kv : pair of array, ``[b, n, g, d]``
        This rank's keys and values.
    out : array, ``[b, n, a, d]``
        What `attend` returned.
    statistics : array, ``[2, b, a, n, 1]``
        What `attend` returned.
    mask : AttentionMask
        The attention mask of the queries.

    Returns
    -------
    dq : array, ``[b, n, a, d]``
        The cotangent of the queries.
    dk : array, ``[b, n, g, d]``
        The cotangent of the keys, summed over the queries of all ranks.
    dv : array, ``[b, n, g, d]``
        The cotangent of the values, summed over the queries of all ranks.

    Notes
    -----
    **Communication:** messages round the ring of c ranks: once more the keys and values of all others, and in c
    messages the cotangents of keys and values, ``(4 c - 2) b n g d`` words received where blocks are equal. 16-bit
    cotangents travel as float32, in which they are summed.
    """
    dq, returning = None, _ReturningCotangents(kv, mask)
    # dK[B, S_seq, G, D] and dV sum over the queries of all ranks of seq: each adds its part as the blocks come round
    for source, block in _around(kv, mask):
        dk, dv = None, None
        for tile in mask.tiles(source):
            rows, known = (slice(None), tile.queries, ...), _take_rows((out, statistics), tile.queries)
            k, v = (x[:, tile.keys, ...] for x in block)
            x, y, z = kernels.of(mask.grid).attention_backward(
                do[rows], q[rows], k, v, *known, tile.causal, tile.padding, tile.positions, tile.window
            )
            dq = _add_rows(dq, tile.queries, x, q)
            dk, dv = _add_rows(dk, tile.keys, y, block[0]), _add_rows(dv, tile.keys, z, block[1])
            _progress(mask)
        returning.add(source, [_or_zeros(dk, block[0]), _or_zeros(dv, block[1])])
    totals = _or_zeros(dq, q), *returning.arrived()
    dq, dk, dv = (backend.namespace(q).astype(x, q.dtype, copy=False) for x in totals)
    return dq, dk, dv


def _or_zeros(total: Block | None, like: Block) -> Block:
    """Return a sum, or zeros of the shape of `like` where nothing was added."""
    return wide(backend.zeros_like(like, like.shape)) if total is None else total


def _add_rows(total: Block | None, where: slice, term: Block, like: Block) -> Block:
    """Return a sum with a term added to some of its queries or keys; the sum is made when it is first needed."""
    if total is None and term.shape == like.shape:
        return wide(term)
    total = _or_zeros(total, like)
    total[:, where, ...] += wide(term)
    return total


class _ReturningCotangents:
    """The cotangents of keys and values on their way round the ring, back to the rank that holds the keys."""

    def __init__(self, kv: Blocks, mask: AttentionMask) -> None:
        self.kv, self.mask = kv, mask
        self._coming: Sequence[Block] = ()
        self._pending: Pending | None = None

    def add(self, source: int, own: Sequence[Block]) -> None:
        """Add this rank's part to the sum of the others for the keys of rank `source`, and send the sum on."""
        for part, total in zip(own, self.arrived(), strict=False):  # nothing has arrived for this rank's own keys yet
            part += total
        self._coming = own
        if self.mask.ranks > 1:
            self._coming = [wide(x) for x in _empty(self.kv, self.mask, source - 1)]
            self._pending = _send_on(own, self._coming, self.mask, _COTANGENTS)

    def arrived(self) -> Sequence[Block]:
        """Return what came from the rank before this one."""
        if self._pending is not None:
            self._pending.wait()
        return self._coming


def _around(kv: Blocks, mask: AttentionMask) -> Iterator[tuple[int, Blocks]]:
    """Yield each rank of the ring, from this one backwards, with its keys and values, while the next ones arrive."""
    for step in range(mask.ranks):
        source, pending = (mask.rank - step) % mask.ranks, None
        if step < mask.ranks - 1:
            following = _empty(kv, mask, source - 1)
            pending = _send_on(kv, following, mask, _KEYS_AND_VALUES)
        yield source, kv
        if pending is not None:
            pending.wait()
            kv = following


def _empty(kv: Blocks, mask: AttentionMask, source: int) -> Blocks:
    """Return uninitialised blocks of the shape of the keys and values of rank `source`."""
    low, high = mask.ranges[source % mask.ranks]
    k, v = (backend.empty_like(x, (x.shape[0], high - low, *x.shape[2:])) for x in kv)
    return k, v


def _send_on(send: Sequence[Block], recv: Sequence[Block], mask: AttentionMask, stream: int) -> Pending:
    """Start to send blocks to the next rank of the ring and to receive the blocks of the rank before."""
    after, before = ((mask.rank + by) % mask.ranks for by in (1, -1))
    outgoing, incoming = [(after, x) for x in send], [(before, x) for x in recv]
    # K[B, S_seq, G, D] of rank i goes to rank i + 1: a shift along seq
    return start_exchange(mask.grid, mask.axes, outgoing, incoming, stream, op="receive")


def _progress(mask: AttentionMask) -> None:
    """Let MPI move messages that are under way."""
    if mask.ranks > 1:
        progress(mask.grid)
