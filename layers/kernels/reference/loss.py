"""Losses over a dim that may be cut."""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace


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

    The target distribution is `off` for every class and `on` more for the label: 1 and 0 without smoothing.
    """
    xp = namespace(logits)
    shifted = logits - top[..., None]
    hit = _one_hot(labels, start, logits.shape[-1])
    target = xp.sum(xp.where(hit, shifted, xp.zeros_like(shifted)), axis=-1)
    if off:
        target = on * target + off * xp.sum(shifted, axis=-1)
    return xp.stack([xp.sum(xp.exp(shifted), axis=-1), target])


def _one_hot(labels: Block, start: int, count: int) -> Block:
    xp = namespace(labels)
    return labels[..., None] == xp.arange(start, start + count)


def cross_entropy_losses(top: Block, sums: Block, valid: Block, z_loss: float = 0.0) -> Block:
    """Return ``log Z - target . logits + z_loss (log Z)^2`` where the label is valid, else 0.

    `sums` are those of `cross_entropy_sums` over the whole vocabulary, and ``log Z`` is that of the logits themselves.
    """
    xp = namespace(sums)
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
    xp = namespace(logits)
    d = xp.exp(logits - top[..., None])
    d /= total[..., None]
    if z_loss:
        d *= (1 + 2 * z_loss * (xp.log(total) + top))[..., None]
    hit = xp.astype(_one_hot(labels, start, logits.shape[-1]), d.dtype)
    d -= on * hit + off if off else hit
    d *= scale * xp.astype(labels >= 0, d.dtype)[..., None]
    return d
