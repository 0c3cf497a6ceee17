"""Normalisation layers, RMSNorm and LayerNorm, over a last dim that may be cut.

Transformer blocks and models build them by name with `normalisation`. They call the ``norm`` kernels of their grid and
sum the statistics with an allreduce over the axes that cut the dim.
"""

from __future__ import annotations

from collections.abc import Callable

from numpy.typing import DTypeLike

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.platform.backend import Block


class RMSNorm(Layer):
    """Normalisation of the last dim by the root of its mean square, ``y = x / sqrt(mean(x^2) + eps) * gain``.

    Parameters
    ----------
    size : int
        The global size of the last dim, h.
    parallelism : Parallelism
        The mode, which chooses the layout of the gain.
    name : str
        Prefix of the name of the parameter ``gain``, ``[h]``.
    eps : float
        The number that is added to the mean square.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    ShapeError
        From `forward`, if the last dim of x is not `size`.

    Notes
    -----
    It takes x ``[..., h]`` in any layout and reduces partial sums first. The gain is cut as the stream's h is.

    Squares are summed in the dtype of x, of 16-bit floats in float32, as PyTorch has it. Where they overflow, which in
    float32 they do for x beyond about 1e19, the result is 0.

    **Communication:** over the axes that cut h, p ranks: an allreduce of ``[b, s]`` forward and one backward, together
    ``4 (p - 1) b s`` words summed over ranks; none where h is whole. The gradient of the gain is reduced over the axes
    that cut b and s.

    References
    ----------
    Zhang, Sennrich: Root mean square layer normalization, 2019.
    """

    bias: Parameter | None = None
    centred = False
    """True if the mean is subtracted first."""

    def __init__(
        self, size: int, parallelism: Parallelism, name: str, *, eps: float = 1e-5, dtype: DTypeLike = "float32"
    ) -> None:
        self.size, self.eps, self.name = size, eps, name
        self.gain = Parameter(f"{name}.gain", [size], parallelism.stream("h"), parallelism, fill=1.0, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        if x.shape[-1:] != (self.size,):
            raise ShapeError(f"{self.name} normalises over {self.size}; its input is {x.shape}")
        given, x = x, self._normalised(x)
        # X[B_row, S, H_col] * gain[H_col]
        gain, bias = self._vector(self.gain, x), None if self.bias is None else self._vector(self.bias, x)
        # mean over h: M[B_row, S] {U_col} -> M[B_row, S]: allreduce over col
        norm = kernels.of(x.grid).norm
        y, statistics = norm(x.local, gain, bias, self.centred, self.eps, self.size, self._sum_over_h(x))
        return x.like(y), (self.save(given, x), gain, statistics)

    def _normalised(self, x: DistArray) -> DistArray:
        """Return the array that is normalised: the input, without partial sums."""
        return x.reduced()

    def _cotangent_layout(self, dy: DistArray, x: DistArray) -> Layout:
        """Return the layout in which the backward pass takes the cotangent: that of the normalised array."""
        return x.layout

    def _vector(self, parameter: Parameter, x: DistArray) -> Block:
        """Return the gain or the bias, cut as the last dim of x."""
        return parameter.use(Layout(x.layout.dims[-1])).local

    def _sum_over_h(self, x: DistArray) -> Callable[[Block], Block] | None:
        """Return the function that adds the ranks' sums over h; None where h is whole."""
        axes = x.layout.dims[-1]
        # S[B_row, S] {U_col} -> S[B_row, S]: allreduce over the axes that cut h
        return (lambda local: comm.allreduce(local, x.grid, axes)) if axes else None

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        saved, gain, statistics = cache
        x: DistArray = self.load(saved, self._normalised)
        # dY -> dY[B_row, S, H_col], the layout of X
        dy = dy.redistribute(self._cotangent_layout(dy, x))
        norm_backward = kernels.of(dy.grid).norm_backward
        dx, *sums = norm_backward(dy.local, x.local, gain, statistics, self.size, self._sum_over_h(x))
        # dY[B_row, S, H_col] summed over b and s -> dgain[H_col] {U_row}
        *rows, last = x.layout.dims
        layout = Layout(last, partial=[*(axis for axes in rows for axis in axes), *dy.layout.partial])
        for parameter, local in zip((self.gain, self.bias), sums, strict=True):
            if parameter is not None:
                parameter.accumulate(DistArray(local, (self.size,), layout, x.grid))
        return dy.like(dx)


class LayerNorm(RMSNorm):
    """Normalisation of the last dim by mean and variance, ``y = (x - mean) / sqrt(var + eps) * gain + bias``.

    Parameters
    ----------
    size : int
        The global size of the last dim, h.
    parallelism : Parallelism
        The mode, which chooses the layout of gain and bias.
    name : str
        Prefix of the names of the parameters ``gain`` and ``bias``, ``[h]``.
    eps : float
        The number that is added to the variance.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    ShapeError
        From `forward`, if the last dim of x is not `size`.

    Notes
    -----
    The variance is taken about the mean, in two passes: ``E[x^2] - E[x]^2`` would lose half of the digits. Where the
    squares overflow (see `RMSNorm`), the result is the bias, and NaN with PyTorch's kernel.

    **Communication:** over the axes that cut h, p ranks: two allreduces of ``[b, s]`` forward and one of
    ``[2, b, s]`` backward, together ``8 (p - 1) b s`` words summed over ranks; none where h is whole. The gradients of
    gain and bias are reduced over the axes that cut b and s.

    References
    ----------
    Ba, Kiros, Hinton: Layer normalization, 2016.
    """

    centred = True

    def __init__(
        self, size: int, parallelism: Parallelism, name: str, *, eps: float = 1e-5, dtype: DTypeLike = "float32"
    ) -> None:
        super().__init__(size, parallelism, name, eps=eps, dtype=dtype)
        self.bias = Parameter(f"{name}.bias", [size], parallelism.stream("h"), parallelism, dtype=dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}
"""The normalisations by the names that blocks and models give them."""


def normalisation(
    kind: str, size: int, parallelism: Parallelism, name: str, *, eps: float, dtype: DTypeLike
) -> RMSNorm:
    """Return a new normalisation layer of a kind in `NORMS`; raise an OptionError if there is no such kind."""
    if kind not in NORMS:
        raise OptionError(f"{name}: norm={kind!r}: use one of {', '.join(map(repr, NORMS))}")
    return NORMS[kind](size, parallelism, name, eps=eps, dtype=dtype)
