"""Keys and values of the tokens so far, kept for the queries to come."""

from __future__ import annotations

import math
from functools import reduce

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layers.positions import given_positions
from colossal_mpi.layout import Layout, bounds
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class KeyValues:
    """Keys and values of every attention layer, one array for each, written in place as tokens come.

    A `Context` with such a cache makes causal attention append the keys and values of its tokens and attend to all that
    are there. Slot i of a sample is that of position i. A query sees the slots up to its own position: what padding has
    left in later ones is never seen, and overwritten by the token that comes to stand there. Such a pass has no
    adjoint.

    Parameters
    ----------
    length : int
        Slots of a sample: positions must be below it.

    Notes
    -----
    Of L layers with g heads of keys and values of width d, b samples and T slots, all ranks together hold
    ``2 L b T g d`` elements, and each rank its share: b is cut as it is inside a block, the heads by the axes that cut
    them (where these cut the queries of a group, each holds all groups), and slot i is on rank ``i mod c`` of the c
    that cut s in attention.

    **Communication:** none where no axis cuts s in attention. Else, for s new tokens, b samples and a heads of queries
    on a rank, the tokens are gathered, ``(c - 1) (s/c) b (a + 2 g) d`` words, and each rank receives of the others what
    their slots add to the outputs of its tokens, ``(c - 1) (s/c) b a (d + 2)``; the parts are merged by the peaks and
    sums of their scores, which is exact.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._arrays: dict[Layer, Block] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of this rank."""
        return sum(array.size * backend.numpy_dtype(array.dtype).itemsize for array in self._arrays.values())

    def attend(self, layer: Layer, q: DistArray, kv: DistArray, ctx: Context) -> DistArray:
        """Append keys and values ``[b, s, 2, g, d]``; return the attention of queries ``[b, s, ..., d]`` to all slots.

        Parameters
        ----------
        layer : Layer
            Whose they are.
        q, kv : DistArray
            Cut alike over b and s; the heads of q between s and d, some for each of g.
        ctx : Context
            Its positions are those of the new tokens, in ascending order; without any they are the first.

        Returns
        -------
        DistArray
            Shaped and cut as q.

        Raises
        ------
        OptionError
            If the layer is not causal: its queries would see tokens to come.
        ShapeError
            On the ranks that hold it, if a position is beyond the last slot.
        """
        if not getattr(layer, "causal", False):
            raise OptionError("keys and values are kept for causal attention alone: use a model of causal=True")
        at = _Place(q)
        new, pairs = (x.redistribute(Layout(x.layout.dims[0], None, *x.layout.dims[2:])) for x in (q, kv))
        positions = given_positions(ctx, new)
        array = self._array(layer, pairs, at)
        if positions is None:
            positions = backend.namespace(array).arange(new.shape[1])
            filled = _put_first(array, self._checked(new.shape[1]), pairs.local, at)
        else:
            filled = _put(array, self._checked(_most(positions)), pairs.local, positions, at)
        keys, x = array[:, : at.count(filled), ...], new.local
        heads = backend.namespace(x).reshape(x, (*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1]))
        order = positions, at.slots(keys)
        local = kernels.of(q.grid).attention(heads, keys[:, :, 0, ...], keys[:, :, 1, ...], True, None, order)
        return q.like(_merged(local, q, new))

    def _array(self, layer: Layer, kv: DistArray, at: _Place) -> Block:
        if layer not in self._arrays:
            b, _, two, g, d = kv.local.shape
            self._arrays[layer] = backend.zeros_like(kv.local, (b, at.count(self.length), two, g, d))
        return self._arrays[layer]

    def _checked(self, slots: int) -> int:
        if slots > self.length:
            raise ShapeError(f"a token at position {slots - 1} needs {slots} slots; the cache has {self.length}")
        return slots


class _Place:
    """Which slots this rank holds: every c-th, from its number among the c ranks that cut s on."""

    def __init__(self, x: DistArray) -> None:
        axes = x.layout.dims[1]
        self.ranks = x.grid.extent(axes)
        self.number = bounds(self.ranks, axes, x.grid.axes, x.grid.coords)[0]

    def count(self, slots: int) -> int:
        """Return how many of the first slots of a sample are here."""
        return len(range(self.number, slots, self.ranks))

    def slots(self, array: Block) -> Block:
        """Return the slots ``[n]`` of an array ``[b, n, ...]``."""
        return backend.namespace(array).arange(array.shape[1]) * self.ranks + self.number


def _most(positions: Block) -> int:
    """Return the number of slots up to the greatest position."""
    return int(backend.namespace(positions).max(positions)) + 1 if positions.size else 0


def _put_first(array: Block, filled: int, kv: Block, at: _Place) -> int:
    """Write the keys and values of the first tokens; return how many slots are filled."""
    array[:, : at.count(filled), ...] = kv[:, at.number :: at.ranks, ...]
    return filled


def _put(array: Block, filled: int, kv: Block, positions: Block, at: _Place) -> int:
    """Write keys and values at positions ``[s]`` or ``[b, s]``; return how many slots are filled at most."""
    xp, slots = backend.namespace(array), at.slots(array)
    positions = xp.broadcast_to(positions, kv.shape[:2])
    for j in range(kv.shape[1]):
        hit = slots[None, :] == positions[:, j][:, None]
        array[hit] = kv[:, j, ...][xp.any(hit, axis=1)]
    return filled


def _merged(made: tuple[Block, Block], q: DistArray, new: DistArray) -> Block:
    """Return the attention ``[b, s, ..., d]`` of this rank's tokens to the slots of all ranks."""
    (out, statistics), axes = made, q.layout.dims[1]
    xp, c = backend.namespace(out), q.grid.extent(axes)
    if c == 1:
        return xp.reshape(out, q.local.shape)
    pair = xp.reshape(_packed(out, statistics), (1, *new.local.shape[:-1], q.shape[-1] + 2))
    parts = DistArray(pair, (c, *q.shape[:-1], q.shape[-1] + 2), Layout(axes, *new.layout.dims), q.grid)
    parts = parts.redistribute(Layout(None, *q.layout.dims)).local
    b, s = q.local.shape[:2]
    parts = xp.reshape(parts, (c, b, s, math.prod(q.local.shape[2:-1]), q.shape[-1] + 2))
    merged, _ = reduce(kernels.of(q.grid).attention_merge, [_unpacked(parts[i, ...]) for i in range(c)])
    return xp.astype(xp.reshape(merged, q.local.shape), q.dtype, copy=False)


def _packed(out: Block, statistics: Block) -> Block:
    """Return outputs, peaks and sums, ``[b, s, a, d + 2]``."""
    xp = backend.namespace(out)
    rest = xp.permute_dims(statistics[..., 0], (1, 3, 2, 0))
    return xp.concat([xp.astype(out, rest.dtype, copy=False), rest], axis=-1)


def _unpacked(pair: Block) -> tuple[Block, Block]:
    """Return outputs and statistics as `kernels.attention` does."""
    return pair[..., :-2], backend.namespace(pair).permute_dims(pair[..., -2:], (3, 0, 2, 1))[..., None]
