"""The head of a language model."""

from __future__ import annotations

from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.layer import Context, Later
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class Head(Linear):
    """A `Linear` of all tokens, or of the one of each sample that the context's `wanted` names.

    **Communication:** besides that of `Linear`, ``b h`` words are summed over the axes that cut s where one is wanted.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the logits ``[b, s, v]``, or ``[b, 1, v]`` of the tokens that are wanted."""
        x, outside = _of_wanted(x, ctx)
        y, cache = super().forward(x, ctx)
        return y, (cache, outside)

    def replay(self, x: DistArray, ctx: Context) -> Any:
        """Return the operands that are kept."""
        x, outside = _of_wanted(x, ctx)
        return super().replay(x, ctx), outside

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the input: zeros where no logits were wanted."""
        inside, outside = cache
        dx = super().backward(dy, inside, later)
        return dx if outside is None else _spread(dx, *outside)


def _of_wanted(x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
    """Return the tokens whose logits are wanted, and where they were; None where they are all."""
    if ctx.wanted is None:
        return x, None
    return pick(x, ctx.wanted), (ctx.wanted, x.shape[1], x.layout.with_partial())


def pick(x: DistArray, wanted: np.ndarray) -> DistArray:
    """Return ``[b, 1, n]`` of ``x [b, s, n]``: of sample i what is at index ``wanted[i]`` of s.

    **Communication:** a sum over the axes that cut s, ``b n`` words in all reduce-scattered. **Adjoint:** it is laid
    into zeros.
    """
    x = x.reduced()
    xp, hit = backend.namespace(x.local), _hit(x, wanted)
    block = xp.sum(xp.where(hit, x.local, xp.zeros_like(x.local)), axis=1, keepdims=True, dtype=x.dtype)
    b, s, n = x.layout.dims
    part = DistArray(block, (x.shape[0], 1, x.shape[2]), Layout(b, None, n, partial=s), x.grid)
    return part.redistribute(Layout(b, s, n))


def _spread(dy: DistArray, wanted: np.ndarray, length: int, layout: Layout) -> DistArray:
    """Return ``[b, s, n]`` with what `pick` would find, zeros elsewhere, for s of `length`, in a layout."""
    b, _, n = layout.dims
    dy = dy.redistribute(Layout(b, None, n))
    shape = (dy.shape[0], length, dy.shape[2])
    box = layout.box(shape, dy.grid.axes, dy.grid.coords)
    blank = backend.zeros_like(dy.local, tuple(stop - start for start, stop in box))
    zeros = DistArray(blank, shape, layout, dy.grid)
    return zeros.like(backend.namespace(blank).where(_hit(zeros, wanted), dy.local, blank))


def _hit(x: DistArray, wanted: np.ndarray) -> Block:
    """Say, ``[b, s, 1]``, which tokens of this rank's block are wanted."""
    rows, columns = x.box[:2]
    mine = backend.to_block(np.asarray(wanted[slice(*rows)], np.int64), x.local)
    xp = backend.namespace(mine)
    return (xp.arange(*columns)[None, :] == mine[:, None])[..., None]
