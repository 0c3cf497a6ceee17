"""Layer norm and its root-mean-square form over a dim that may be cut, called by the norm layers.

The caller passes a function that completes sums over the ranks that cut the dim.
"""

from __future__ import annotations

from collections.abc import Callable

from colossal_mpi.layers.kernels.reference.wide import like, wide
from colossal_mpi.platform.backend import Block, namespace, sum_over

Total = Callable[[Block], Block] | None
"""A function that sums an array over the ranks that cut h. None if no axis cuts h."""

Statistics = tuple[Block | None, Block]
"""Mean (None if it is not subtracted) and reciprocal of the deviation, each ``[...]`` for an array ``[..., h]``."""


def norm(
    x: Block, gain: Block, bias: Block | None, centred: bool, eps: float, size: int, total: Total = None
) -> tuple[Block, Statistics]:
    """Return ``(x - mean) / sqrt(mean of squares + eps) * gain + bias``, and the statistics.

    Parameters
    ----------
    x : array
        Block ``[..., h]``.
    gain : array
        Gain ``[h]`` of this rank's part of h.
    bias : array, optional
        Bias ``[h]`` of this rank's part of h.
    centred : bool
        Whether the mean is subtracted first: layer norm. False is the root-mean-square form.
    eps : float
        Number that is added to the mean of squares.
    size : int
        Size of the whole of h.
    total : callable, optional
        ``total(array)`` sums an array over the ranks that cut h. None if no axis cuts h.

    Returns
    -------
    y : array
        Result ``[..., h]`` in the dtype of `x`.
    statistics : pair of array
        Mean ``[...]`` (None if it is not subtracted) and reciprocal of the deviation ``[...]``, in float32 if `x` is of
        16 bits.

    References
    ----------
    Ba, Kiros, Hinton: Layer normalization, 2016. Zhang, Sennrich: Root mean square layer normalization, 2019.
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
    # S[...] {U_h} -> S[...]: allreduce over the axes that cut h, by the caller's function
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
    """Return the cotangents of the input, the gain and the bias of `norm`.

    Parameters
    ----------
    dy : array
        Cotangent ``[..., h]`` of the result.
    x : array
        Input ``[..., h]`` of `norm`.
    gain : array
        Gain ``[h]``.
    statistics : pair of array
        What `norm` returned.
    size : int
        Size of the whole of h.
    total : callable, optional
        As `norm` takes it.

    Returns
    -------
    dx : array
        Cotangent of `x`, in its shape and dtype.
    dgain : array
        Cotangent ``[h]`` of the gain, summed over the rows of this block, in float32 if `x` is of 16 bits.
    dbias : array or None
        Cotangent ``[h]`` of the bias in the same dtype. None if the mean is not subtracted.
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
