"""Ring attention: ranks that cut the sequence send each other keys and values, and attend to one rank's at a time.

`Attention` and `GroupedAttention` call `attend` and `attend_backward` for the blocks of a rank; where no axis cuts the
sequence the ring has one rank and nothing is sent. Both call the attention kernels of the grid and
the exchanges of `colossal_mpi.comm`.

Each rank keeps its queries. In step t it attends to keys and values of the rank t places before it in the ring, while
those of the next step arrive. Of each sample, a rank receives the keys that some query of its own sees, and no others.
That is half of them where a causal sequence is cut into one run for each rank, and few where windows or documents are
short. In the backward pass it gives the cotangents of these keys back to the rank that holds them, which adds them in
the order of the ring. No rank holds an array of the length of the sequence, except the padding mask and positions given
whole.

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
from colossal_mpi.layers.attention.mask import AttentionMask, Box, Tile
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
    **Communication:** a message from each other rank with keys that this rank's queries see: ``2 k g d`` words received
    for k such keys, counted in each sample. Without a causal order that is ``2 (c - 1) b n g d`` in a ring of c equal
    blocks.
    """
    queries = mask.runs_of(mask.rank)
    parts: list[Blocks | None] = [None] * len(queries)
    # Q[B, S_seq, A, D] . K[B, S, G, D]^T -> scores; softmax(scores) . V[B, S, G, D] -> O[B, S_seq, A, D],
    # with the keys and values of one rank of seq after the other
    for source, block in _arriving(kv, mask):
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
    **Communication:** once more the keys and values of `attend`, and from each other rank the cotangents of the keys of
    this rank that it sees: ``2 (k + m) g d`` words received for k keys that this rank sees of others and m, counted for
    each of them, that others see of this rank. Without a causal order that is ``4 (c - 1) b n g d`` in a ring of c
    equal blocks. 16-bit cotangents travel as float32, in which they are summed.
    """
    dq, returning = None, _ReturningCotangents(kv, mask)
    # dK[B, S_seq, G, D] and dV sum over the queries of all ranks of seq: each sends its part to the rank of the keys
    for source, block in _arriving(kv, mask):
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
    """The cotangents of keys and values on their way from the ranks that saw the keys to the rank that holds them."""

    def __init__(self, kv: Blocks, mask: AttentionMask) -> None:
        self.kv, self.mask = kv, mask
        self._totals: Sequence[Block] = ()
        self._step = 0
        self._pending: tuple[Pending, int, Sequence[Block]] | None = None

    def add(self, source: int, parts: Sequence[Block]) -> None:
        """Keep this rank's own cotangents, or send those of the keys of rank `source` back to it."""
        if source == self.mask.rank:
            self._totals = parts
            return
        self._step += 1
        self.arrived()
        reader = (self.mask.rank + self._step) % self.mask.ranks
        coming = [wide(x) for x in _buffers(self.kv, self.mask, reader, self.mask.rank)]
        boxes = self.mask.boxes(self.mask.rank, source)
        sent = parts
        if boxes is not None:
            sent = [_packed(x, [(some, place) for some, _, place in boxes]) for x in parts]
        # dK[B, rows, G, D] of the keys of rank i - t goes home from rank i
        if pending := _exchange((source, sent), (reader, coming), self.mask, _COTANGENTS):
            self._pending = pending, reader, coming

    def arrived(self) -> Sequence[Block]:
        """Return the sums of this rank's keys and values, with what has been sent to it so far."""
        if self._pending is not None:
            pending, reader, coming = self._pending
            pending.wait()
            boxes, rows = self.mask.boxes(reader, self.mask.rank), self.mask.rows(reader, self.mask.rank)
            for total, part in zip(self._totals, coming, strict=True):
                if boxes is None:
                    for place, at in _places(rows):
                        total[:, at, ...] += part[:, place, ...]
                else:
                    for (samples, at, _), terms in zip(boxes, _unpacked(part, boxes), strict=True):
                        total[samples, at, ...] += terms
            self._pending = None
        return self._totals


def _arriving(kv: Blocks, mask: AttentionMask) -> Iterator[tuple[int, Blocks]]:
    """Yield each rank of the ring, from this one backwards, with its keys and values that this rank's queries see.

    Those of the next rank arrive meanwhile. Where samples see different keys, the others are zeros.
    """
    source, block = mask.rank, kv
    for step in range(1, mask.ranks + 1):
        following, pending = (mask.rank - step) % mask.ranks, None
        if step < mask.ranks:
            reader = (mask.rank + step) % mask.ranks
            coming = _buffers(kv, mask, mask.rank, following)
            # K[B, rows, G, D] of rank i goes to rank i + t: a shift along seq, of the rows that are seen there
            outgoing = _seen_of(kv, mask, reader)
            pending = _exchange((reader, outgoing), (following, coming), mask, _KEYS_AND_VALUES)
        yield source, block
        if pending is not None:
            pending.wait()
        if step < mask.ranks:
            source, block = following, _spread(coming, mask, following)


def _seen_of(kv: Blocks, mask: AttentionMask, reader: int) -> Blocks:
    """Return this rank's keys and values that some query of another rank sees, contiguous."""
    rows, boxes = mask.rows(reader, mask.rank), mask.boxes(reader, mask.rank)
    if boxes is not None:
        k, v = (_packed(x, [(samples, at) for samples, at, _ in boxes]) for x in kv)
        return k, v
    if rows == [slice(0, kv[0].shape[1])]:
        return kv
    if not rows:
        return _empty(kv, rows)
    xp = backend.namespace(kv[0])
    k, v = (backend.contiguous(xp.concat([x[:, at, ...] for at in rows], axis=1)) for x in kv)
    return k, v


def _packed(x: Block, parts: Sequence[tuple[slice, slice]]) -> Block:
    """Return the rows of some samples of ``[b, n, g, d]``, one part after the other, as ``[1, rows, g, d]``."""
    xp = backend.namespace(x)
    rows = [xp.reshape(x[samples, at, ...], (1, -1, *x.shape[2:])) for samples, at in parts]
    return backend.contiguous(xp.concat(rows, axis=1))


def _unpacked(x: Block, boxes: Sequence[Box]) -> Iterator[Block]:
    """Yield the rows ``[samples, rows, g, d]`` of each box from what `_packed` made of them."""
    start = 0
    for samples, at, _ in boxes:
        shape = samples.stop - samples.start, at.stop - at.start
        stop = start + shape[0] * shape[1]
        yield backend.namespace(x).reshape(x[0, start:stop, ...], (*shape, *x.shape[2:]))
        start = stop


def _buffers(kv: Blocks, mask: AttentionMask, reader: int, source: int) -> Blocks:
    """Return uninitialised blocks for the keys and values of rank `source` that some query of rank `reader` sees."""
    boxes = mask.boxes(reader, source)
    if boxes is None:
        return _empty(kv, mask.rows(reader, source))
    count = sum((samples.stop - samples.start) * (at.stop - at.start) for samples, at, _ in boxes)
    k, v = (backend.empty_like(x, (1, count, *x.shape[2:])) for x in kv)
    return k, v


def _spread(arrived: Blocks, mask: AttentionMask, source: int) -> Blocks:
    """Return the keys and values of rank `source` in the order of `AttentionMask.rows`, the same rows of each sample.

    Keys that a sample does not see are zeros: its queries' windows hide them.
    """
    boxes = mask.boxes(mask.rank, source)
    if boxes is None:
        return arrived
    length = sum(at.stop - at.start for at in mask.rows(mask.rank, source))
    k, v = (backend.zeros_like(x, (mask.samples, length, *x.shape[2:])) for x in arrived)
    for whole, x in zip((k, v), arrived, strict=True):
        for (samples, _, place), some in zip(boxes, _unpacked(x, boxes), strict=True):
            whole[samples, place, ...] = some
    return k, v


def _empty(kv: Blocks, rows: Sequence[slice]) -> Blocks:
    """Return uninitialised blocks for some rows of keys and values."""
    length = sum(at.stop - at.start for at in rows)
    k, v = (backend.empty_like(x, (x.shape[0], length, *x.shape[2:])) for x in kv)
    return k, v


def _places(rows: Sequence[slice]) -> Iterator[tuple[slice, slice]]:
    """Yield for each range of rows its place among them, one range after the other, and the range."""
    start = 0
    for at in rows:
        yield slice(start, start + at.stop - at.start), at
        start += at.stop - at.start


def _exchange(
    outgoing: tuple[int, Sequence[Block]], incoming: tuple[int, Sequence[Block]], mask: AttentionMask, stream: int
) -> Pending | None:
    """Start to send blocks to a rank of the ring and to receive blocks from another; blocks without rows do not go."""
    send, recv = ([(rank, x) for x in blocks if x.shape[1]] for rank, blocks in (outgoing, incoming))
    return start_exchange(mask.grid, mask.axes, send, recv, stream, op="receive") if send or recv else None


def _progress(mask: AttentionMask) -> None:
    """Let MPI move messages that are under way."""
    if mask.ranks > 1:
        progress(mask.grid)
