"""Softmax attention."""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace


def _scores(q: Block, k: Block, causal: bool, mask: Block | None) -> Block:
    """Return the scores ``[b, a, s, s]`` of queries and keys ``[b, s, a, d]``, -inf where a key is hidden."""
    xp = namespace(q)
    scores = xp.matmul(_heads(q), xp.matrix_transpose(_heads(k)))
    scores *= 1.0 / math.sqrt(q.shape[-1])
    hidden = None
    if causal:
        s = q.shape[1]
        hidden = xp.triu(xp.ones((s, s), dtype=xp.bool), k=1)
    if mask is not None:
        padding = ~mask[:, None, None, :]
        hidden = padding if hidden is None else hidden | padding
    return scores if hidden is None else xp.where(hidden, xp.asarray(-math.inf, dtype=scores.dtype), scores)


def _heads(x: Block) -> Block:
    return namespace(x).permute_dims(x, (0, 2, 1, 3))


def attention(q: Block, k: Block, v: Block, causal: bool = True, mask: Block | None = None) -> tuple[Block, Block]:
    """Return softmax attention ``[b, s, a, d]`` and, stacked ``[2, b, a, s, 1]``, the scores' peaks and sums.

    The sums are of ``exp(score - peak)``. Their logarithm added to the peak would lose it where the peak is large.

    Parameters
    ----------
    q, k, v : array, ``[b, s, a, d]``
    causal : bool
        Whether query i sees the keys to i only.
    mask : bool array, ``[b, s]``, optional
        The keys that are seen. A query that sees none gives zeros: its peak is 0 and its sum 1.
    """
    xp = namespace(q)
    p = _scores(q, k, causal, mask)
    if p.size == 0:
        return xp.zeros_like(q), xp.ones((2, *p.shape[:-1], 1), dtype=q.dtype)
    peaks = xp.max(p, axis=-1, keepdims=True)
    if mask is not None:
        peaks = xp.where(peaks == -math.inf, xp.zeros_like(peaks), peaks)
    p -= peaks
    p = xp.exp(p)
    sums = xp.sum(p, axis=-1, keepdims=True)
    if mask is not None:
        sums = xp.where(sums == 0.0, xp.ones_like(sums), sums)
    p /= sums
    return _heads(xp.matmul(p, _heads(v))), xp.stack([peaks, sums])


def attention_backward(
    do: Block,
    q: Block,
    k: Block,
    v: Block,
    o: Block,
    statistics: Block,
    causal: bool = True,
    mask: Block | None = None,
) -> tuple[Block, Block, Block]:
    """Return the cotangents of q, k, v; the probabilities are made again from the statistics (Dao et al. 2022)."""
    xp = namespace(q)
    p = _scores(q, k, causal, mask)
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
