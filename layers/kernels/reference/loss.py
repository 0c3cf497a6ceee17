"""Cross-entropy over classes that may be cut, called by the loss and by everything that needs a maximum of logits."""

from __future__ import annotations

import math

from colossal_mpi.layers.kernels.reference.wide import like, wide
from colossal_mpi.platform.backend import Block, namespace


def peak(logits: Block) -> Block:
    """Return the maximum over the last dim, minus infinity if this rank's part of it is empty.

    Parameters
    ----------
    logits : array
        Block ``[..., v]``.

    Returns
    -------
    array
        Maxima ``[...]`` in the dtype of `logits`.
    """
    xp = namespace(logits)
    if not logits.shape[-1]:
        return xp.full(logits.shape[:-1], -math.inf, dtype=logits.dtype)
    return xp.max(logits, axis=-1)


def cross_entropy_sums(
    logits: Block, labels: Block, top: Block, start: int, on: float = 1.0, off: float = 0.0
) -> Block:
    """Return a part's sums of ``exp(logits - top)`` and of ``target (logits - top)``.

    Parameters
    ----------
    logits : array
        Logits ``[..., v]`` of this rank's part of the classes.
    labels : array
        Integer labels ``[...]``, negative if they do not count.
    top : array
        Maxima ``[...]`` over all classes.
    start : int
        Global number of the part's first class.
    on : float
        Share of the label in the target distribution, besides `off`: 1 without smoothing.
    off : float
        Share of every class in the target distribution: 0 without smoothing.

    Returns
    -------
    array
        Both sums, stacked ``[2, ...]``, in float32 if `logits` are of 16 bits.
    """
    xp = namespace(logits)
    shifted = wide(logits) - wide(top)[..., None]
    target = _at_labels(shifted, labels, start)
    if off:
        target = on * target + off * xp.sum(shifted, axis=-1)
    return xp.stack([xp.sum(xp.exp(shifted), axis=-1), target])


def _at_labels(x: Block, labels: Block, start: int) -> Block:
    """Return a part's elements at the labels, 0 if the part does not have the label."""
    xp, local = namespace(x), labels - start
    here = (local >= 0) & (local < x.shape[-1])
    if not x.shape[-1]:
        return xp.zeros(x.shape[:-1], dtype=x.dtype)
    found = xp.take_along_axis(x, xp.where(here, local, xp.zeros_like(local))[..., None], axis=-1)[..., 0]
    return xp.where(here, found, xp.zeros_like(found))


def cross_entropy_losses(top: Block, sums: Block, valid: Block, z_loss: float = 0.0) -> Block:
    """Return ``log Z - target . logits + z_loss (log Z)^2`` if the label is valid, else 0.

    Z is the sum of ``exp(logits)`` over all classes.

    Parameters
    ----------
    top : array
        Maxima ``[...]`` over all classes.
    sums : array
        What `cross_entropy_sums` returned, ``[2, ...]``, summed over all classes.
    valid : array
        Bool ``[...]``: true where the label counts.
    z_loss : float
        Coefficient of the square of log Z.

    Returns
    -------
    array
        Losses ``[...]`` in the dtype of `sums`.

    References
    ----------
    Chowdhery et al.: PaLM, 2022 (z-loss).
    """
    xp, top = namespace(sums), wide(top)
    total, target = sums[0, ...], sums[1, ...]
    log = xp.log(total)
    losses = log - target
    if z_loss:
        losses += z_loss * (log + top) ** 2
    return losses * xp.astype(valid, losses.dtype)


def cross_entropy_backward(
    logits: Block,
    labels: Block,
    top: Block,
    total: Block,
    start: int,
    scale: float,
    on: float = 1.0,
    off: float = 0.0,
    z_loss: float = 0.0,
) -> Block:
    """Return the cotangent of a part of the logits: ``scale ((1 + 2 z_loss log Z) softmax - target)``.

    Parameters
    ----------
    logits : array
        Logits ``[..., v]`` of this rank's part of the classes.
    labels : array
        Integer labels ``[...]``. The cotangent is 0 if a label is negative.
    top : array
        Maxima ``[...]`` over all classes.
    total : array
        Sums ``[...]`` of ``exp(logits - top)`` over all classes.
    start : int
        Global number of the part's first class.
    scale : float
        Factor of all cotangents.
    on : float
        Share of the label in the target distribution, besides `off`: 1 without smoothing.
    off : float
        Share of every class in the target distribution: 0 without smoothing.
    z_loss : float
        Coefficient of the square of log Z.

    Returns
    -------
    array
        Cotangent in the shape and dtype of `logits`.
    """
    xp, given = namespace(logits), logits
    logits, top = wide(logits), wide(top)
    weight = scale * xp.astype(labels >= 0, logits.dtype)
    factor = weight / total
    if z_loss:
        factor *= 1 + 2 * z_loss * (xp.log(total) + top)
    d = logits - top[..., None]
    d = xp.exp(d)
    d *= factor[..., None]
    if off:
        d -= (off * weight)[..., None]
    hit = labels[..., None] == xp.arange(start, start + logits.shape[-1], dtype=labels.dtype)
    d[hit] -= on * weight[xp.any(hit, axis=-1)]
    return like(given, d)
