"""LayerNorm over a dim that may be cut."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend, comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer, Parameter
from colossal_mpi.layers.parallelism import Parallelism


class LayerNorm(Layer):
    """Layer normalisation of the residual stream ``[b, s, h]`` with gain and bias.

    The variance is taken about the mean, in two passes: E[x^2] - E[x]^2 loses half of the digits.

    Notes
    -----
    **Communication:** over the axes that cut h, p ranks: two allreduces of ``[b, s]`` forward and one of
    ``[2, b, s]`` backward, in all ``8 (p - 1) b s`` words summed over ranks; gain and bias are gathered and their
    gradients reduced.

    References
    ----------
    Ba, Kiros, Hinton: Layer normalization, 2016.
    """

    def __init__(
        self, size: int, parallelism: Parallelism, name: str, *, eps: float = 1e-5, dtype: Any = "float32"
    ) -> None:
        self.size, self.eps = size, eps
        self.used = parallelism.stream("h")
        self.gain = Parameter(f"{name}.gain", [size], self.used, parallelism, fill=1.0, dtype=dtype)
        self.bias = Parameter(f"{name}.bias", [size], self.used, parallelism, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``(x - mean) / sqrt(var + eps) * gain + bias``."""
        xp = backend.namespace(x.local)
        mean = self._mean(x, xp.sum(x.local, axis=-1))
        variance = self._mean(x, xp.sum((x.local - mean[..., None]) ** 2, axis=-1))
        rstd = 1.0 / xp.sqrt(variance + self.eps)
        gain, bias = (p.value.redistribute(self.used).local for p in (self.gain, self.bias))
        y = kernels.normalise(x.local, mean, rstd)
        y *= gain
        y += bias
        return x.like(y), (x, mean, rstd, gain)

    def _mean(self, x: DistArray, local: Any) -> Any:
        return comm.allreduce(local, x.grid, x.layout.dims[-1]) / self.size

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of x; those of gain and bias go to the gradients."""
        x, mean, rstd, gain = cache
        dy = dy.redistribute(x.layout)
        xp = backend.namespace(dy.local)
        y = kernels.normalise(x.local, mean, rstd)
        rows = list(range(dy.ndim - 1))
        self.gain.accumulate(dy.like(dy.local * y).sum_over(rows))
        self.bias.accumulate(dy.sum_over(rows))
        d = dy.local * gain
        sums = xp.stack([xp.sum(d, axis=-1), xp.sum(d * y, axis=-1)])
        sums = comm.allreduce(sums, x.grid, x.layout.dims[-1])
        return x.like(kernels.normalise_backward(d, y, rstd, sums, self.size))
