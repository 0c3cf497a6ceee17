"""LayerNorm and RMSNorm over a dim that may be cut."""

from __future__ import annotations

from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.replay import kept, taken
from colossal_mpi.layout import Layout


class RMSNorm(Layer):
    """Normalisation by the root of the mean square of the last dim, with gain, of arrays ``[..., h]``.

    Free of moves of its vectors in the layout of the stream, right in any; partial sums are reduced first.

    Parameters
    ----------
    size : int
        The whole of h.
    parallelism : Parallelism
    name : str
        Prefix of the name of the parameter ``gain``.
    eps : float
        Added to the mean square.
    dtype

    Raises
    ------
    ShapeError
        From `forward`, if the last dim is not `size`.

    Notes
    -----
    **Communication:** over the axes that cut h, p ranks: an allreduce of ``[b, s]`` forward and backward, in all
    ``4 (p - 1) b s`` words summed over ranks; the gradient of the gain is reduced over those that cut b and s.

    References
    ----------
    Zhang, Sennrich: Root mean square layer normalization, 2019.
    """

    bias: Parameter | None = None
    centred = False

    def __init__(
        self, size: int, parallelism: Parallelism, name: str, *, eps: float = 1e-5, dtype: Any = "float32"
    ) -> None:
        self.size, self.eps, self.name = size, eps, name
        self.gain = Parameter(f"{name}.gain", [size], parallelism.stream("h"), parallelism, fill=1.0, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x / sqrt(mean(x^2) + eps) * gain``."""
        if x.shape[-1:] != (self.size,):
            raise ShapeError(f"{self.name} normalises over {self.size}; its input is {x.shape}")
        x, bias = x.reduced(), None if self.bias is None else self._vector(self.bias, x)
        gain = self._vector(self.gain, x)
        y, statistics = kernels.of(x.grid).norm(x.local, gain, bias, self.centred, self.eps, self.size, self._total(x))
        return x.like(y), (kept(x, x), gain, statistics)

    def _vector(self, parameter: Parameter, x: DistArray) -> Any:
        return parameter.use(Layout(x.layout.dims[-1])).local

    def _total(self, x: DistArray) -> Any:
        """Return what finishes a sum over h; None where h is not cut."""
        axes = x.layout.dims[-1]
        return (lambda local: comm.allreduce(local, x.grid, axes)) if axes else None

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of x; those of the vectors go to their gradients."""
        source, gain, statistics = cache
        x: DistArray = taken(source)
        dy = dy.redistribute(x.layout)
        dx, *sums = kernels.of(dy.grid).norm_backward(dy.local, x.local, gain, statistics, self.size, self._total(x))
        *rows, last = x.layout.dims
        layout = Layout(last, partial=[axis for axes in rows for axis in axes])
        for parameter, local in zip((self.gain, self.bias), sums, strict=True):
            if parameter is not None:
                parameter.accumulate(DistArray(local, (self.size,), layout, x.grid))
        return x.like(dx)


class LayerNorm(RMSNorm):
    """Normalisation by mean and variance of the last dim, with gain and bias, of arrays ``[..., h]``.

    The variance is taken about the mean, in two passes: E[x^2] - E[x]^2 loses half of the digits. Parameters are those
    of `RMSNorm`; there is a parameter ``bias`` more.

    Notes
    -----
    **Communication:** over the axes that cut h, p ranks: two allreduces of ``[b, s]`` forward and one of
    ``[2, b, s]`` backward, in all ``8 (p - 1) b s`` words summed over ranks; the gradients of gain and bias are
    reduced over those that cut b and s.

    References
    ----------
    Ba, Kiros, Hinton: Layer normalization, 2016.
    """

    centred = True

    def __init__(
        self, size: int, parallelism: Parallelism, name: str, *, eps: float = 1e-5, dtype: Any = "float32"
    ) -> None:
        super().__init__(size, parallelism, name, eps=eps, dtype=dtype)
        self.bias = Parameter(f"{name}.bias", [size], parallelism.stream("h"), parallelism, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``(x - mean) / sqrt(var + eps) * gain + bias``."""
        return super().forward(x, ctx)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
"""The normalisations by the names that blocks and models give them."""


def normalisation(kind: str, size: int, parallelism: Parallelism, name: str, *, eps: float, dtype: Any) -> RMSNorm:
    """Return the normalisation of that name.

    Raises
    ------
    OptionError
        If there is none.
    """
    if kind not in NORMS:
        raise OptionError(f"{name}: norm={kind!r}: use one of {', '.join(map(repr, NORMS))}")
    return NORMS[kind](size, parallelism, name, eps=eps, dtype=dtype)
