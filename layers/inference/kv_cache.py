"""The KV cache: keys and values of the tokens so far, kept for the queries of later tokens.

`generate` makes a `KVCache` and hands it to the model in the `Context`; attention layers call `KVCache.attend`, which
calls the attention kernels of ``layers.kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import reduce

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layout import Layout, bounds
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class KVCache:
    """Keys and values of every attention layer, one array for each layer, written in place as tokens come.

    With a cache in its `Context`, causal attention appends the keys and values of its tokens, and its queries attend to
    everything in the cache. Slot i of a sample belongs to the token at position i. A query sees the slots up to its own
    position: it never sees the padding in later slots, and later tokens overwrite it. A forward pass with a cache has
    no adjoint.

    A layer with a sliding window of w tokens has w slots if these are fewer: the token at position i takes slot
    ``i mod w`` from the one that has left the window.

    Parameters
    ----------
    length : int
        Number of slots of a sample. Positions must be below it.

    Notes
    -----
    For L layers with g heads of keys and values of width d, b samples and T slots, all ranks together hold ``2 L b T g
    d`` elements, with ``min(T, w)`` in place of T for a window, and each rank holds its share. b is cut as it is inside
    a block, and heads are cut by the axes that cut them there; where these axes cut the queries of a group, each rank
    holds the keys and values of all groups. Slot i is on rank ``i mod c`` of the c ranks that cut s in attention.

    **Communication:** none where no axis cuts s in attention. Otherwise, for s new tokens, b samples and a heads of
    queries on a rank: an allgather of the new tokens, ``(c - 1) (s/c) b (a + 2 g) d`` words, and an all_to_all, in
    which each rank receives from every other one the attention of its tokens to that rank's slots, ``(c - 1) (s/c) b a
    (d + 2)`` words. The partial results are merged exactly, by the peaks and sums of their scores.

    References
    ----------
    Pope et al.: Efficiently scaling transformer inference, 2022.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._arrays: dict[object, Block] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's arrays."""
        return sum(array.size * backend.numpy_dtype(array.dtype).itemsize for array in self._arrays.values())

    def attend(self, layer: object, q: DistArray, kv: DistArray, ctx: Context) -> DistArray:
        """Append the keys and values of new tokens, and return the attention of their queries to all slots.

        Parameters
        ----------
        layer : object
            Attention layer that the keys and values belong to. A query sees the slots in its ``window``, if it has one.
        q : DistArray
            Queries ``[b, s, ..., d]`` of the new tokens, the heads between s and d, in order of their groups.
        kv : DistArray
            Keys and values ``[b, s, 2, g, d]`` of the new tokens, cut over b and s as `q` is.
        ctx : Context
            Its positions belong to the new tokens, in ascending order; by default they are the first positions.

        Returns
        -------
        DistArray
            Attention of each query, in the shape and layout of `q`.

        Raises
        ------
        OptionError
            If the layer is not causal: its queries would see later tokens.
        ShapeError
            On the ranks that hold the token, if a position is beyond the last slot.

        Notes
        -----
        **Communication:** as the class says, over the axes that cut s. **Adjoint:** none.
        """
        if not getattr(layer, "causal", False):
            raise OptionError("keys and values are kept for causal attention alone: use a model of causal=True")
        own = _Slots(q)
        # q[B_data, S_seq, A_col, D], kv[B_data, S_seq, 2, G_col, D] -> whole s on each rank: allgather over seq
        new, pairs = (x.redistribute(Layout(x.layout.dims[0], None, *x.layout.dims[2:])) for x in (q, kv))
        positions = ctx.positions_of(new)
        window = getattr(layer, "window", None)
        slots = self.length if window is None else min(window, self.length)
        array = self._array(layer, pairs, own.count(slots))
        filled = self._checked(new.shape[1] if positions is None else _greatest(positions))
        x, attention = new.local, kernels.of(q.grid).attention
        heads = backend.namespace(x).reshape(x, (*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1]))
        parts: Iterable[_Part]
        if slots < self.length:
            parts = _put_in_ring(array, pairs, positions, own, slots, _last(ctx, pairs))
        else:
            parts = [_put(array, filled, pairs.local, positions, own)]
        # q[B_data, S, A_col, D] . k[B_data, T_seq, G_col, D] -> out[B_data, S, A_col, D], of this rank's slots T_seq
        done = [
            attention(heads[:, rows, ...], keys[:, :, 0, ...], keys[:, :, 1, ...], True, None, order, window)
            for rows, keys, order in parts
        ]
        return q.like(_merged(_joined(done), q, new))

    def _array(self, layer: object, kv: DistArray, slots: int) -> Block:
        if layer not in self._arrays:
            b, _, two, g, d = kv.local.shape
            self._arrays[layer] = backend.zeros_like(kv.local, (b, slots, two, g, d))
        return self._arrays[layer]

    def _checked(self, slots: int) -> int:
        if slots > self.length:
            raise ShapeError(f"a token at position {slots - 1} needs {slots} slots; the cache has {self.length}")
        return slots


class _Slots:
    """The slots of this rank: every c-th one, starting from the rank's number among the c ranks that cut s."""

    def __init__(self, x: DistArray) -> None:
        axes = x.layout.dims[1]
        self.ranks = x.grid.extent(axes)
        self.number = bounds(self.ranks, axes, x.grid.axes, x.grid.coords)[0]

    def count(self, slots: int) -> int:
        """Return how many of the first slots of a sample are on this rank."""
        return len(range(self.number, slots, self.ranks))

    def positions(self, array: Block) -> Block:
        """Return the positions ``[n]`` of the slots of an array ``[b, n, ...]``."""
        return backend.namespace(array).arange(array.shape[1]) * self.ranks + self.number


def _greatest(positions: Block) -> int:
    """Return the number of slots up to the greatest position."""
    return int(backend.namespace(positions).max(positions)) + 1 if positions.size else 0


_Part = tuple[slice, Block, tuple[Block, Block]]
"""A range of queries, the keys and values ``[b, t, 2, g, d]`` that they may see, and the positions of both."""


def _put(array: Block, filled: int, kv: Block, positions: Block | None, own: _Slots) -> _Part:
    """Write keys and values at positions ``[s]`` or ``[b, s]``, by default the first, and return what queries see."""
    xp = backend.namespace(array)
    if positions is None:
        positions = xp.arange(kv.shape[1])
        array[:, : own.count(filled), ...] = kv[:, own.number :: own.ranks, ...]
    else:
        for j in range(kv.shape[1]):
            _put_token(array, kv, own.positions(array), xp.broadcast_to(positions, kv.shape[:2]), j)
    keys = array[:, : own.count(filled), ...]
    return slice(None), keys, (positions, own.positions(keys))


def _put_token(array: Block, kv: Block, slots: Block, at: Block, j: int) -> None:
    """Write token j of each sample into the one of this rank's slots that `at` ``[b, s]`` names, if it is there."""
    hit = slots[None, :] == at[:, j][:, None]
    array[hit] = kv[:, j, ...][backend.namespace(array).any(hit, axis=1)]


def _put_in_ring(
    array: Block, kv: DistArray, positions: Block | None, own: _Slots, slots: int, last: Block
) -> Iterator[_Part]:
    """Write keys and values into the slots of a window, and yield what each range of queries sees.

    Tokens that are the first of their samples see one another before the last of them are kept: up to the token at
    index `last` ``[b]``, after which there is padding. Later tokens are written and attend one by one, so that none
    takes the slot of a token that another query still sees.
    """
    xp, new = backend.namespace(array), kv.local
    mine = own.positions(array)
    if positions is None:
        rows, at = xp.arange(new.shape[0])[:, None], _held(xp.broadcast_to(last, (new.shape[0],))[:, None], mine, slots)
        array[...] = new[rows, xp.clip(at, 0, max(new.shape[1] - 1, 0))] if new.size else 0
        keys = new[:, own.number :: own.ranks, ...]
        yield slice(None), keys, (xp.arange(new.shape[1]), own.positions(keys))
        return
    positions = xp.broadcast_to(positions, new.shape[:2])
    for j in range(new.shape[1]):
        _put_token(array, new, mine, positions % slots, j)
        now = positions[:, j : j + 1]
        held = _held(now, mine, slots)
        yield slice(j, j + 1), array, (now, xp.where(held < 0, now + 1, held))  # an empty slot seems to come later


def _held(newest: Block, slots: Block, count: int) -> Block:
    """Return the positions ``[b, n]`` that slots hold when the newest ones ``[b, 1]`` are written; below 0: none."""
    return newest - (newest - slots) % count


def _last(ctx: Context, kv: DistArray) -> Block:
    """Return the index in s of the last token of each sample of this rank's block: behind it there is padding."""
    at = None if ctx.decoding is None else ctx.decoding.logits_at
    xp, (start, stop) = backend.namespace(kv.local), kv.box[0]
    return xp.full((stop - start,), kv.shape[1] - 1) if at is None else backend.to_block(at[start:stop], kv.local)


def _joined(parts: list[tuple[Block, Block]]) -> tuple[Block, Block]:
    """Return what `kernels.attention` has returned for ranges of queries as if it had been called for all of them."""
    if len(parts) == 1:
        return parts[0]
    xp = backend.namespace(parts[0][0])
    return xp.concat([out for out, _ in parts], axis=1), xp.concat([sums for _, sums in parts], axis=3)


def _merged(local: tuple[Block, Block], q: DistArray, new: DistArray) -> Block:
    """Return the attention ``[b, s, ..., d]`` of this rank's tokens to the slots of all ranks.

    Parameters
    ----------
    local : pair of array
        Attention of all new tokens to this rank's slots, as ``kernels.attention`` returns it.
    q : DistArray
        Queries, cut over s.
    new : DistArray
        Queries, not cut over s.
    """
    (out, statistics), axes = local, q.layout.dims[1]
    xp, c = backend.namespace(out), q.grid.extent(axes)
    if c == 1:
        return xp.reshape(out, q.local.shape)
    pair = xp.reshape(_packed(out, statistics), (1, *new.local.shape[:-1], q.shape[-1] + 2))
    parts = DistArray(pair, (c, *q.shape[:-1], q.shape[-1] + 2), Layout(axes, *new.layout.dims), q.grid)
    # parts[C_seq, B_data, S, A_col, D + 2] -> parts[C, B_data, S_seq, A_col, D + 2]: all_to_all over seq
    parts = parts.redistribute(Layout(None, *q.layout.dims)).local
    b, s = q.local.shape[:2]
    parts = xp.reshape(parts, (c, b, s, math.prod(q.local.shape[2:-1]), q.shape[-1] + 2))
    merged, _ = reduce(kernels.of(q.grid).attention_merge, [_unpacked(parts[i, ...]) for i in range(c)])
    return xp.astype(xp.reshape(merged, q.local.shape), q.dtype, copy=False)


def _packed(out: Block, statistics: Block) -> Block:
    """Return outputs, peaks and sums in one array ``[b, s, a, d + 2]``."""
    xp = backend.namespace(out)
    rest = xp.permute_dims(statistics[..., 0], (1, 3, 2, 0))
    return xp.concat([xp.astype(out, rest.dtype, copy=False), rest], axis=-1)


def _unpacked(pair: Block) -> tuple[Block, Block]:
    """Return outputs and statistics as ``kernels.attention`` returns them."""
    return pair[..., :-2], backend.namespace(pair).permute_dims(pair[..., -2:], (3, 0, 2, 1))[..., None]
