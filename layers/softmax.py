"""Softmax over a dim that may be cut."""

from __future__ import annotations

from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import kernels
from colossal_mpi.layers.kernels import like, wide
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.platform import backend


class Softmax(Layer):
    """``exp(x) / sum(exp(x))`` over the last dim, in any layout; partial sums are reduced first.

    Notes
    -----
    **Communication:** over the axes that cut the last dim, p ranks and n rows: one maximum and one sum of n forward and
    one sum of n backward, in all ``6 (p - 1) n`` words summed over ranks. An empty block has maximum -inf and sum 0.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the probabilities, in the layout of `x`."""
        x = x.reduced()
        xp, grid, axes = backend.namespace(x.local), x.grid, x.layout.dims[-1]
        top = comm.allreduce(kernels.of(grid).peak(x.local), grid, axes, comm.MAX)
        y = xp.exp(wide(x.local) - wide(top)[..., None])
        y /= comm.allreduce(xp.sum(y, axis=-1), grid, axes)[..., None]
        y = like(x.local, y)
        return x.like(y), x.like(y)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return ``y (dy - sum(y dy))``."""
        y = cache
        xp, d, p = backend.namespace(y.local), wide(dy.redistribute(y.layout).local), wide(y.local)
        total = comm.allreduce(xp.sum(p * d, axis=-1), y.grid, y.layout.dims[-1])
        return y.like(like(y.local, p * (d - total[..., None])))
