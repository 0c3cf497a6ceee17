"""Elementwise layers: local in every layout."""

from __future__ import annotations

from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer


class GELU(Layer):
    """The tanh form of the Gaussian error linear unit. **Communication:** none.

    References
    ----------
    Hendrycks, Gimpel: Gaussian error linear units, 2016.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``gelu(x)``, in the layout of `x`."""
        return x.like(kernels.gelu(x.local)), x

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return ``dy gelu'(x)``."""
        dy = dy.redistribute(cache.layout)
        return cache.like(kernels.gelu_backward(dy.local, cache.local))
