"""Each formula once, in the array API: any library, any float dtype. Nothing here knows of ranks.

Sums over a dim that may be cut are left to the layer: a function that needs one takes it or returns its local part.
"""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace
from colossal_mpi.errors import ShapeError

_GELU = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def gelu(x: Block) -> Block:
    """Return the tanh form of GELU (Hendrycks & Gimpel 2016)."""
    xp = namespace(x)
    t = xp.tanh(_GELU * (x + _CUBIC * (x * x * x)))
    t += 1.0
    t *= x
    t *= 0.5
    return t


def gelu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `gelu`."""
    xp = namespace(x)
    square = x * x
    t = xp.tanh(_GELU * x * (1.0 + _CUBIC * square))
    slope = 1.0 - t * t
    slope *= x
    slope *= _GELU * (1.0 + 3.0 * _CUBIC * square)
    slope += t
    slope += 1.0
    slope *= dy
    slope *= 0.5
    return slope


def normalise(x: Block, mean: Block, rstd: Block) -> Block:
    """Return ``(x - mean) rstd`` with statistics per leading index."""
    y = x - mean[..., None]
    y *= rstd[..., None]
    return y


def normalise_backward(dy: Block, y: Block, rstd: Block, sums: Block, n: int) -> Block:
    """Return the cotangent of the input of a layer normalisation before gain and bias.

    Parameters
    ----------
    dy, y : array, ``[..., h]``
        Cotangent and value of the normalised array.
    rstd : array, ``[...]``
    sums : array, ``[2, ...]``
        Sums of `dy` and of ``dy * y`` over the whole of h.
    n : int
        The whole of h.
    """
    dx = dy - (sums[0, ...] / n)[..., None]
    dx -= y * (sums[1, ...] / n)[..., None]
    dx *= rstd[..., None]
    return dx


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


def lookup(table: Block, ids: Block, start: int) -> Block:
    """Return rows of a piece of a table: row ``ids - start`` where the piece has it, zeros elsewhere.

    Parameters
    ----------
    table : array, ``[rows, h]``
        Global rows ``start`` to ``start + rows``.
    ids : integer array, ``[...]``
        Global row numbers.
    """
    xp = namespace(table)
    flat, here = _rows(ids, start, table.shape[0])
    if not table.shape[0]:
        return xp.zeros((*ids.shape, table.shape[1]), dtype=table.dtype)
    rows = xp.take(table, flat, axis=0)
    rows *= xp.astype(here, table.dtype)[:, None]
    return xp.reshape(rows, (*ids.shape, table.shape[1]))


def _rows(ids: Block, start: int, count: int) -> tuple[Block, Block]:
    """Return flat row numbers inside a piece of a table, 0 where it has not the row, and where it has it."""
    xp = namespace(ids)
    local = xp.reshape(ids, (-1,)) - start
    here = (local >= 0) & (local < count)
    return xp.where(here, local, xp.zeros_like(local)), here


def lookup_backward(dy: Block, ids: Block, start: int, count: int) -> Block:
    """Return the cotangent ``[count, h]`` of the table of `lookup`.

    Equal rows are added by one product with a 0/1 matrix of the distinct ids, in a fixed order.
    """
    xp = namespace(dy)
    flat, here = _rows(ids, start, count)
    if not flat.size or not count:
        return xp.zeros((count, dy.shape[-1]), dtype=dy.dtype)
    distinct, place = xp.unique_inverse(flat)
    same = xp.reshape(place, (1, -1)) == xp.arange(distinct.shape[0])[:, None]
    hits = xp.astype(same & here[None, :], dy.dtype)
    sums = xp.matmul(hits, xp.reshape(dy, (flat.shape[0], dy.shape[-1])))
    rows = xp.arange(count)
    nearest = xp.clip(xp.searchsorted(distinct, rows), max=distinct.shape[0] - 1)
    table = xp.take(sums, nearest, axis=0)
    table *= xp.astype(xp.take(distinct, nearest) == rows, dy.dtype)[:, None]
    return table


def require_ids(ids: Block, count: int, least: int | None = 0) -> None:
    """Require integer ids from `least` (None: any) to below `count`.

    Raises
    ------
    ShapeError
        On the ranks that hold an id outside, which ends the job.
    """
    xp = namespace(ids)
    if not ids.size:
        return
    low, high = int(xp.min(ids)), int(xp.max(ids))
    if high >= count or (least is not None and low < least):
        raise ShapeError(f"token ids from {low} to {high} for a vocabulary of {count}: they must be below it, from 0")


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
