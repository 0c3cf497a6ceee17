"""Losses over a dim that may be cut."""

from __future__ import annotations

import math

from colossal_mpi.layers.kernels.reference.wide import like, wide
from colossal_mpi.platform.backend import Block, namespace


def peak(logits: Block) -> Block:
    """Return the maximum over the last dim; -inf over an empty piece of it."""
    xp = namespace(logits)
    if not logits.shape[-1]:
        return xp.full(logits.shape[:-1], -math.inf, dtype=logits.dtype)
    return xp.max(logits, axis=-1)


def cross_entropy_sums(
    logits: Block, labels: Block, top: Block, start: int, on: float = 1.0, off: float = 0.0
) -> Block:
    """Return, stacked ``[2, ...]``, a piece's sums of ``exp(logits - top)`` and of ``target (logits - top)``.

    The target distribution is `off` for every class and `on` more for the label: 1 and 0 without smoothing. The sums of
    16-bit logits are float32.
    """
    xp = namespace(logits)
    shifted = wide(logits) - wide(top)[..., None]
    target = _at_labels(shifted, labels, start)
    if off:
        target = on * target + off * xp.sum(shifted, axis=-1)
    return xp.stack([xp.sum(xp.exp(shifted), axis=-1), target])


def _at_labels(x: Block, labels: Block, start: int) -> Block:
    """Return the elements of a piece of the classes at the labels, 0 where it has not the label."""
    xp, local = namespace(x), labels - start
    here = (local >= 0) & (local < x.shape[-1])
    if not x.shape[-1]:
        return xp.zeros(x.shape[:-1], dtype=x.dtype)
    found = xp.take_along_axis(x, xp.where(here, local, xp.zeros_like(local))[..., None], axis=-1)[..., 0]
    return xp.where(here, found, xp.zeros_like(found))


def cross_entropy_losses(top: Block, sums: Block, valid: Block, z_loss: float = 0.0) -> Block:
    """Return ``log Z - target . logits + z_loss (log Z)^2`` where the label is valid, else 0.

    `sums` are those of `cross_entropy_sums` over the whole vocabulary, and ``log Z`` is that of the logits themselves.
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
    """Return the cotangent of the logits' piece: ``scale ((1 + 2 z_loss log Z) softmax - target)``, 0 if not valid.

    `top` and `total` are the maximum and the sum of ``exp(logits - top)`` over the whole vocabulary; a label is
    valid if it is not negative.
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
