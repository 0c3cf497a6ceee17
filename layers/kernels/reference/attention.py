"""Softmax attention."""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace


def _scores(q: Block, k: Block) -> Block:
    """Return the causal scores ``[b, a, s, s]`` of queries and keys ``[b, s, a, d]``, -inf above the diagonal."""
    xp = namespace(q)
    scores = xp.matmul(_heads(q), xp.matrix_transpose(_heads(k)))
    scores *= 1.0 / math.sqrt(q.shape[-1])
    s = q.shape[1]
    future = xp.triu(xp.ones((s, s), dtype=xp.bool), k=1)
    return xp.where(future, xp.asarray(-math.inf, dtype=scores.dtype), scores)


def _heads(x: Block) -> Block:
    return namespace(x).permute_dims(x, (0, 2, 1, 3))


def attention(q: Block, k: Block, v: Block) -> tuple[Block, Block]:
    """Return causal softmax attention ``[b, s, a, d]`` and, stacked ``[2, b, a, s, 1]``, the scores' peaks and sums.

    The sums are of ``exp(score - peak)``. Their logarithm added to the peak would lose it where the peak is large.
    """
    xp = namespace(q)
    p = _scores(q, k)
    if p.size == 0:
        return xp.zeros_like(q), xp.ones((2, *p.shape[:-1], 1), dtype=q.dtype)
    peaks = xp.max(p, axis=-1, keepdims=True)
    p -= peaks
    p = xp.exp(p)
    sums = xp.sum(p, axis=-1, keepdims=True)
    p /= sums
    return _heads(xp.matmul(p, _heads(v))), xp.stack([peaks, sums])


def attention_backward(
    do: Block, q: Block, k: Block, v: Block, o: Block, statistics: Block
) -> tuple[Block, Block, Block]:
    """Return the cotangents of q, k, v; the probabilities are made again from the statistics (Dao et al. 2022)."""
    xp = namespace(q)
    p = _scores(q, k)
    p -= statistics[0, ...]
    p = xp.exp(p)
    p /= statistics[1, ...]
    dv = xp.matmul(xp.matrix_transpose(p), _heads(do))
    ds = xp.matmul(_heads(do), xp.matrix_transpose(_heads(v)))
    ds -= _heads(xp.sum(do * o, axis=-1, keepdims=True))
    ds *= p
    ds *= 1.0 / math.sqrt(q.shape[-1])
    dq = xp.matmul(ds, _heads(k))
    dk = xp.matmul(xp.matrix_transpose(ds), _heads(q))
    return _heads(dq), _heads(dk), _heads(dv)
