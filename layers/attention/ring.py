"""Ring attention: keys and values travel round the ranks that cut the sequence, which attend to a part at a time.

Each rank keeps its queries. In step t it attends to the keys and values of the rank t places before it, while those of
the next step are under way. In the backward pass the cotangents of keys and values travel behind them, each rank adds
its part, and the last message brings them home. No rank holds anything as long as the sequence but a mask and given
positions, which are known whole.

References
----------
Liu, Zaharia, Abbeel: Ring attention with blockwise transformers for near-infinite context, 2023. Milakov & Gimelshein:
Online normalizer calculation for softmax, 2018 (the merging of parts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from colossal_mpi.comm import Pending, progress, start_exchange
from colossal_mpi.grid import Grid
from colossal_mpi.layers import kernels
from colossal_mpi.layers.attention.mask import Piece, Sight
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Blocks = tuple[Block, Block]
_FORTH, _BACK = 0, 1
"""Streams of messages: keys and values, and their cotangents, which may overtake one another."""


def attend(q: Block, kv: Blocks, sight: Sight) -> Blocks:
    """Return the attention of this rank's queries to all keys, and its statistics, as `kernels.attention` has them.

    Parts are merged in the order of the ring, from this rank's own on.

    Parameters
    ----------
    q : array, ``[b, n, a, d]``
        This rank's block.
    kv : pair of array, ``[b, n, g, d]``
        This rank's keys and values, contiguous if there are others.
    sight : Sight

    **Communication:** messages round the ring of c ranks: the keys and values of all others, ``2 (c - 1) b n g d``
    words where blocks are equal.
    """
    rows = sight.blocks(sight.rank)
    parts: list[Blocks | None] = [None] * len(rows)
    for source, block in _round(kv, sight):
        for piece in sight.pieces(source):
            parts[piece.row] = _merged(parts[piece.row], attend_piece(q, block, piece, sight.grid), sight.grid)
            _progress(sight)
    nothing = attend_piece(q, kv, Piece(0, slice(None), slice(0), False), sight.grid) if None in parts else (q, q)
    return _joined([part or _rows(nothing, some) for part, some in zip(parts, rows, strict=True)], q)


def attend_piece(q: Block, kv: Blocks, piece: Piece, grid: Grid) -> Blocks:
    """Return the attention of a piece's queries to its keys alone. **Communication:** none."""
    k, v = (x[:, piece.keys, ...] for x in kv)
    attention = kernels.of(grid).attention
    return attention(q[:, piece.queries, ...], k, v, piece.causal, piece.mask, piece.positions)


def _merged(before: Blocks | None, part: Blocks, grid: Grid) -> Blocks:
    """Return the attention to both parts of the keys; outputs of 16 bits are summed in 32."""
    if before is None:
        return part
    return kernels.of(grid).attention_merge((_wide(before[0]), before[1]), part)


def _rows(pair: Blocks, rows: slice) -> Blocks:
    """Return output and statistics of some queries."""
    return pair[0][:, rows, ...], pair[1][:, :, :, rows, :]


def _joined(parts: Sequence[Blocks], q: Block) -> Blocks:
    """Return the outputs, in the dtype of q, and statistics of the stretches of the queries, side by side."""
    xp, (outs, statistics) = backend.namespace(q), zip(*parts, strict=True)
    if len(parts) == 1:
        return xp.astype(outs[0], q.dtype, copy=False), statistics[0]
    return xp.astype(xp.concat(outs, axis=1), q.dtype, copy=False), xp.concat(statistics, axis=3)


def attend_backward(
    do: Block, q: Block, kv: Blocks, out: Block, statistics: Block, sight: Sight
) -> tuple[Block, Block, Block]:
    """Return the cotangents of this rank's queries, keys and values.

    Parameters are those of `attend`, what it returned, and the cotangent of its output.

    **Communication:** messages round the ring of c ranks: the keys and values of all others again, and in c messages
    the cotangents of keys and values, ``(4 c - 2) b n g d`` words where blocks are equal. Cotangents of 16 bits travel
    as of 32, in which they are summed.
    """
    dq, home = None, _Homeward(kv, sight)
    for source, block in _round(kv, sight):
        dk, dv = None, None
        for piece in sight.pieces(source):
            rows, known = (slice(None), piece.queries, ...), _rows((out, statistics), piece.queries)
            k, v = (x[:, piece.keys, ...] for x in block)
            x, y, z = kernels.of(sight.grid).attention_backward(
                do[rows], q[rows], k, v, *known, piece.causal, piece.mask, piece.positions
            )
            dq = _plus(dq, piece.queries, x, q)
            dk, dv = _plus(dk, piece.keys, y, block[0]), _plus(dv, piece.keys, z, block[1])
            _progress(sight)
        home.add(source, [_filled(dk, block[0]), _filled(dv, block[1])])
    dq, dk, dv = (backend.namespace(q).astype(x, q.dtype, copy=False) for x in (_filled(dq, q), *home.arrived()))
    return dq, dk, dv


def _filled(total: Block | None, like: Block) -> Block:
    """Return a sum, zeros if nothing was added."""
    return _wide(backend.zeros_like(like, like.shape)) if total is None else total


def _plus(total: Block | None, where: slice, term: Block, like: Block) -> Block:
    """Return a sum, made when first needed, to some queries or keys of which a term is added."""
    if total is None and term.shape == like.shape:
        return _wide(term)
    total = _filled(total, like)
    total[:, where, ...] += _wide(term)
    return total


class _Homeward:
    """The cotangents of keys and values on their way round the ring."""

    def __init__(self, kv: Blocks, sight: Sight) -> None:
        self.kv, self.sight = kv, sight
        self._coming: Sequence[Block] = ()
        self._pending: Pending | None = None

    def add(self, source: int, own: Sequence[Block]) -> None:
        """Add this rank's part to what the others have added for rank `source`, and send the sum on."""
        for part, total in zip(own, self.arrived(), strict=False):  # nothing has arrived for this rank's own yet
            part += total
        self._coming = own
        if self.sight.ranks > 1:
            self._coming = [_wide(x) for x in _empty(self.kv, self.sight, source - 1)]
            self._pending = _pass_on(own, self._coming, self.sight, _BACK)

    def arrived(self) -> Sequence[Block]:
        """Return what came from the rank before."""
        if self._pending is not None:
            self._pending.wait()
        return self._coming


def _round(kv: Blocks, sight: Sight) -> Iterator[tuple[int, Blocks]]:
    """Yield each rank of the ring, from this one backwards, with its keys and values, the next under way meanwhile."""
    for step in range(sight.ranks):
        source, pending = (sight.rank - step) % sight.ranks, None
        if step < sight.ranks - 1:
            following = _empty(kv, sight, source - 1)
            pending = _pass_on(kv, following, sight, _FORTH)
        yield source, kv
        if pending is not None:
            pending.wait()
            kv = following


def _empty(kv: Blocks, sight: Sight, source: int) -> Blocks:
    """Return uninitialised blocks of the shape of the keys and values of a rank."""
    low, high = sight.spans[source % sight.ranks]
    k, v = (backend.empty_like(x, (x.shape[0], high - low, *x.shape[2:])) for x in kv)
    return k, v


def _pass_on(send: Sequence[Block], recv: Sequence[Block], sight: Sight, stream: int) -> Pending:
    """Send blocks to the next rank of the ring while those of the one before arrive."""
    after, before = ((sight.rank + by) % sight.ranks for by in (1, -1))
    there, back = [(after, x) for x in send], [(before, x) for x in recv]
    return start_exchange(sight.grid, sight.axes, there, back, stream, op="receive")


def _progress(sight: Sight) -> None:
    if sight.ranks > 1:
        progress(sight.grid)


def _wide(block: Block) -> Block:
    wide = backend.wide_dtype(block)
    return block if wide is None else backend.namespace(block).astype(block, wide)
