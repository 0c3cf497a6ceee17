"""The head of a language model: a product to the logits of all tokens, or of one token of each sample.

The models GPT and Llama end with a `Head`. Generation asks, through `Context.decoding`, for the logits of the last
token of each prompt only; it calls `pick` where a model ends otherwise.
"""

from __future__ import annotations

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class Head(Linear):
    """A `Linear` to logits ``[b, s, v]``, or to ``[b, 1, v]`` where the context asks for one token of each sample.

    **Communication:** the collectives of `Linear`, and for one token of each sample the words of `pick`.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        x, picked = _picked(x, ctx)
        y, cache = super().forward(x, ctx)
        return y, (cache, picked)

    def replay(self, x: DistArray, ctx: Context) -> Cache:
        x, picked = _picked(x, ctx)
        return super().replay(x, ctx), picked

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        inner, picked = cache
        dx = super().backward(dy, inner, later)
        return dx if picked is None else _unpick(dx, *picked)


def _picked(x: DistArray, ctx: Context) -> tuple[DistArray, tuple[np.ndarray, int, Layout] | None]:
    """Return the tokens whose logits the context asks for, and the input of `_unpick`; None where it asks for all."""
    at = None if ctx.decoding is None else ctx.decoding.logits_at
    if at is None:
        return x, None
    return pick(x, at), (at, x.shape[1], x.layout.with_partial())


def pick(x: DistArray, at: np.ndarray) -> DistArray:
    """Return the one token of each sample i of ``x [b, s, n]`` that stands at index ``at[i]`` of s, ``[b, 1, n]``.

    **Communication:** a reduce_scatter over the axes that cut s, of ``b n`` words in all. **Adjoint:** `_unpick`.
    """
    x = x.reduced()
    xp, here = backend.namespace(x.local), _is_at(x, at)
    block = xp.sum(xp.where(here, x.local, xp.zeros_like(x.local)), axis=1, keepdims=True, dtype=x.dtype)
    b, s, n = x.layout.dims
    # Y[B_row, 1, N] {U_col} -> Y[B_row, 1_col, N]: reduce_scatter over the axes that cut s
    part = DistArray(block, (x.shape[0], 1, x.shape[2]), Layout(b, None, n, partial=s), x.grid)
    return part.redistribute(Layout(b, s, n))


def _unpick(dy: DistArray, at: np.ndarray, length: int, layout: Layout) -> DistArray:
    """Return ``[b, s, n]`` in `layout`, s of size `length`: dy ``[b, 1, n]`` where `pick` found it, zeros elsewhere."""
    b, _, n = layout.dims
    # dY[B_row, 1_col, N] -> dY[B_row, 1, N]: allgather over the axes that cut s
    dy = dy.redistribute(Layout(b, None, n))
    shape = (dy.shape[0], length, dy.shape[2])
    box = layout.box(shape, dy.grid.axes, dy.grid.coords)
    blank = backend.zeros_like(dy.local, tuple(stop - start for start, stop in box))
    zeros = DistArray(blank, shape, layout, dy.grid)
    return zeros.like(backend.namespace(blank).where(_is_at(zeros, at), dy.local, blank))


def _is_at(x: DistArray, at: np.ndarray) -> Block:
    """Return a mask ``[b, s, 1]`` of this rank's block: true where a sample's token stands at its index."""
    rows, columns = x.box[:2]
    own = backend.to_block(np.asarray(at[slice(*rows)], np.int64), x.local)
    xp = backend.namespace(own)
    return (xp.arange(*columns)[None, :] == own[:, None])[..., None]
