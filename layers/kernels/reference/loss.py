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


def cross_entropy_sums(logits: Block, labels: Block, top: Block, start: int) -> Block:
    """Return, stacked ``[2, ...]``, a piece's sums of ``exp(logits - top)`` and of the label's ``logits - top``."""
    xp = namespace(logits)
    shifted = logits - top[..., None]
    hit = _one_hot(labels, start, logits.shape[-1])
    target = xp.sum(xp.where(hit, shifted, xp.zeros_like(shifted)), axis=-1)
    return xp.stack([xp.sum(xp.exp(shifted), axis=-1), target])


def _one_hot(labels: Block, start: int, count: int) -> Block:
    xp = namespace(labels)
    return labels[..., None] == xp.arange(start, start + count)


def cross_entropy_backward(logits: Block, labels: Block, top: Block, total: Block, start: int, scale: float) -> Block:
    """Return the cotangent of the logits' piece: ``scale (softmax - one hot)`` where the label counts, else 0.

    `top` and `total` are the maximum and the sum of ``exp(logits - top)`` over the whole vocabulary.
    """
    xp = namespace(logits)
    d = xp.exp(logits - top[..., None])
    d /= total[..., None]
    d -= xp.astype(_one_hot(labels, start, logits.shape[-1]), d.dtype)
    d *= scale * xp.astype(labels >= 0, d.dtype)[..., None]
    return d
