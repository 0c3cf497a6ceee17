"""Normalisation over a dim that may be cut: sums over the whole of it are finished by a function that is given."""

from __future__ import annotations

from collections.abc import Callable

from colossal_mpi.layers.kernels.reference.wide import like, wide
from colossal_mpi.platform.backend import Block, namespace, sum_over

Total = Callable[[Block], Block] | None
"""Adds up an array over the ranks among which h is cut; None where it is not."""

Statistics = tuple[Block | None, Block]
"""Mean (None if it is not subtracted) and reciprocal deviation, ``[...]`` of an array ``[..., h]``."""


def norm(
    x: Block, gain: Block, bias: Block | None, centred: bool, eps: float, size: int, total: Total = None
) -> tuple[Block, Statistics]:
    """Return ``(x - mean) / sqrt(mean of squares + eps) * gain + bias``, and the statistics.

    Parameters
    ----------
    x : array, ``[..., h]``
    gain, bias : array, ``[h]``
        A bias may be None.
    centred : bool
        Whether the mean is subtracted first: layer norm, or else the root-mean-square form.
    eps : float
    size : int
        The whole of h.
    total : callable, optional

    Returns
    -------
    array, ``[..., h]``
    Statistics
        In float32 where x is of 16 bits.
    """
    xp, mean, given = namespace(x), None, x
    y = x = wide(x)
    if centred:
        mean = _whole(xp.sum(x, axis=-1), total) / size
        y = x - mean[..., None]
    rstd = 1.0 / xp.sqrt(_whole(xp.vecdot(y, y), total) / size + eps)
    y = _scaled(x, y, rstd)
    y *= gain
    if bias is not None:
        y += bias
    return like(given, y), (mean, rstd)


def _whole(local: Block, total: Total) -> Block:
    return local if total is None else total(local)


def _scaled(x: Block, y: Block, rstd: Block) -> Block:
    """Return ``y * rstd``, in place unless y is x itself."""
    if y is x:
        return y * rstd[..., None]
    y *= rstd[..., None]
    return y


def norm_backward(
    dy: Block, x: Block, gain: Block, statistics: Statistics, size: int, total: Total = None
) -> tuple[Block, Block, Block | None]:
    """Return the cotangents of x, of the gain and, if the mean was subtracted, of the bias.

    Those of gain and bias are sums over the rows that are here, in float32 where x is of 16 bits.
    """
    xp, (mean, rstd), rows, given = namespace(x), statistics, range(x.ndim - 1), x
    dy, x, gain = wide(dy), wide(x), wide(gain)
    y = _scaled(x, x if mean is None else x - mean[..., None], rstd)
    product = dy * y
    dgain = sum_over(product, rows)
    sums = [xp.matmul(product, gain)] + ([] if mean is None else [xp.matmul(dy, gain)])
    means = _whole(xp.stack(sums), total) / size
    y *= means[0, ..., None]
    dx = dy * gain
    dx -= y
    if mean is not None:
        dx -= means[1, ..., None]
    dx *= rstd[..., None]
    return like(given, dx), dgain, None if mean is None else sum_over(dy, rows)
