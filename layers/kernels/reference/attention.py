"""Softmax attention in tiles of queries and keys, so that no array of s x s scores is ever made.

Attention layers, the ring and the KV cache call it. ``tiles`` says how queries and keys are cut.

References
----------
Milakov & Gimelshein: Online normalizer calculation for softmax, 2018. Rabe & Staats: Self-attention does not need
O(n^2) memory, 2021. Dao et al.: FlashAttention, 2022. Ainslie et al.: GQA, 2023.
"""

from __future__ import annotations

import itertools
import math

from colossal_mpi.layers.kernels.reference.tiles import AttentionMask, Positions, Tile, Window, tiles
from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.platform.backend import Block, namespace

State = tuple[Block, Block, Block]
"""``sum_j exp(score_j - peak) v_j [b, g, n, d]``, the peaks ``[b, g, 1, n]`` and ``sum_j exp(score_j - peak)``."""


def attention(
    q: Block,
    k: Block,
    v: Block,
    causal: bool = True,
    mask: Block | None = None,
    positions: Positions = None,
    window: Window = None,
) -> tuple[Block, Block]:
    """Return softmax attention of queries to keys, and the peaks and sums of its scores.

    The keys may be a part of all keys: `attention_merge` merges the results of several parts, and `attention_backward`
    takes one part after the other.

    Parameters
    ----------
    q : array
        Queries ``[b, s, a, d]``.
    k : array
        Keys ``[b, t, g, d]``, where g divides a: head i of q sees head ``i // (a / g)`` of k. With g = a it is
        multi-head attention.
    v : array
        Values ``[b, t, g, d]``.
    causal : bool
        Whether a query sees only keys at its own position and lower ones.
    mask : array, optional
        Bool ``[b, t]``, true for keys that may be seen.
    positions : pair of array or range, optional
        Integer positions of the queries, ``[s]`` or ``[b, s]``, and of the keys, ``[t]`` or ``[b, t]``, or two ranges
        of step 1. By default both are 0, 1, 2, ... They count only if `causal` is true.
    window : int or array, optional
        Number of positions, up to its own, whose keys a query sees, or an array ``[b, s]`` with the number of each
        query; None: all. It counts only if `causal` is true.

    Returns
    -------
    out : array
        Attention ``[b, s, a, d]`` in the dtype of `q`, zeros for a query that sees no key.
    statistics : array
        Peaks and sums ``[2, b, a, s, 1]``: the greatest score of each query, and its sum of ``exp(score - peak)``;
        minus infinity and 0 for a query that sees no key. Float32 if `q` is of 16 bits. Another provider may return any
        peak and sum with the same ``peak + log(sum)``.

    Notes
    -----
    Peaks and sums are kept apart because the sum of a large peak and the logarithm of a sum would lose digits.
    """
    xp, (b, s, a, d), g = namespace(q), q.shape, k.shape[2]
    if 0 in q.shape or 0 in k.shape:
        return xp.zeros_like(q), _nothing(q, (b, a, s, 1))
    q, visible = xp.reshape(q, (b, s, g, a // g, d)), AttentionMask(causal, mask, positions, window)
    out, statistics = xp.zeros_like(q), _nothing(q, (b, g, a // g, s))
    rows, keys = tiles(q, k, causal)
    for tile in itertools.chain.from_iterable(rows):
        x, state = tile.of_queries(q) / math.sqrt(d), None
        for which in visible.ranges(tile, keys):
            # K[b, g, t, D] . Q[b, g, D, n] -> S[b, g, t, n], local; then P . V -> O[b, g, n, D]
            scores = visible.hide(_scores(x, tile.of_keys(k, which)), tile, which)
            state = _merge(state, _sums(scores, tile.of_keys(v, which)))
        if state is not None:
            tile.put_queries(out, state[0] / xp.matrix_transpose(_divisor(state[2])))
            tile.put_statistics(statistics, xp.stack(state[1:]))
    return xp.reshape(out, (b, s, a, d)), xp.reshape(statistics, (2, b, a, s, 1))


def _nothing(q: Block, shape: tuple[int, ...]) -> Block:
    """Return the statistics of queries that see no key."""
    statistics = wide(namespace(q).zeros((2, *shape), dtype=q.dtype))
    statistics[0, ...] = -math.inf
    return statistics


def _scores(q: Block, k: Block) -> Block:
    xp = namespace(q)
    return xp.matmul(k, xp.matrix_transpose(q))


def _finite(peaks: Block) -> Block:
    """Return peaks with 0 in place of minus infinity, so that differences to them are numbers."""
    xp = namespace(peaks)
    return xp.where(peaks == -math.inf, xp.zeros_like(peaks), peaks)


def _divisor(sums: Block) -> Block:
    """Return sums with 1 in place of 0, to divide by."""
    xp = namespace(sums)
    return xp.where(sums == 0.0, xp.ones_like(sums), sums)


def _sums(scores: Block, v: Block) -> State:
    """Return the state of a tile with scores ``[b, g, t, n]``. The scores are overwritten."""
    xp = namespace(scores)
    peaks = xp.max(scores, axis=-2, keepdims=True)
    scores -= _finite(peaks)
    p = xp.exp(scores)
    ones = xp.ones((1, p.shape[-2]), dtype=p.dtype)
    return xp.matmul(xp.matrix_transpose(p), v), peaks, xp.matmul(ones, p)


def _shrink(left: Block, right: Block) -> tuple[Block, Block, Block]:
    """Return the greater of two peaks, and the factor of the sums under each of them."""
    xp = namespace(left)
    peaks = xp.maximum(left, right)
    return peaks, xp.exp(left - _finite(peaks)), xp.exp(right - _finite(peaks))


def _merge(a: State | None, b: State) -> State:
    """Return the state of the keys of both states, in their memory."""
    if a is None:
        return b
    peaks, left, right = _shrink(a[1], b[1])
    for state, factor in ((a, left), (b, right)):
        total, sums = state[0], state[2]
        total *= namespace(total).matrix_transpose(factor)
        sums *= factor
    return _plus(a[0], b[0]), peaks, _plus(a[2], b[2])


def _plus(total: Block | None, term: Block) -> Block:
    """Return a sum, in the memory of `total`."""
    if total is None:
        return term
    total += term
    return total


def attention_merge(left: tuple[Block, Block], right: tuple[Block, Block]) -> tuple[Block, Block]:
    """Return attention to two parts of the keys together.

    Parameters
    ----------
    left : pair of array
        What `attention` returned for one part.
    right : pair of array
        What `attention` returned for the other part.

    Returns
    -------
    out : array
        Attention ``[b, s, a, d]`` to both parts, in the dtype of the left output.
    statistics : array
        Peaks and sums ``[2, b, a, s, 1]`` over both parts.
    """
    xp, dtype = namespace(left[0]), left[0].dtype
    peaks, *factors = _shrink(left[1][0, ...], right[1][0, ...])
    terms = [factor * statistics[1, ...] for factor, (_, statistics) in zip(factors, (left, right), strict=True)]
    sums = terms[0] + terms[1]
    shares = [xp.permute_dims(term / _divisor(sums), (0, 2, 1, 3)) for term in terms]
    out = wide(left[0]) * shares[0] + wide(right[0]) * shares[1]
    return xp.astype(out, dtype, copy=False), xp.stack([peaks, sums])


def attention_backward(
    do: Block,
    q: Block,
    k: Block,
    v: Block,
    o: Block,
    statistics: Block,
    causal: bool = True,
    mask: Block | None = None,
    positions: Positions = None,
    window: Window = None,
) -> tuple[Block, Block, Block]:
    """Return the cotangents of queries, keys and values. The probabilities are recomputed from the statistics.

    Parameters
    ----------
    do : array
        Cotangent ``[b, s, a, d]`` of the output.
    q : array
        Queries ``[b, s, a, d]``.
    k : array
        Keys ``[b, t, g, d]``, all of them or a part.
    v : array
        Values ``[b, t, g, d]`` of the same keys.
    o : array
        Output of `attention` or `attention_merge` for all keys.
    statistics : array
        Statistics of `attention` or `attention_merge` for all keys.
    causal : bool
        Whether a query sees only keys at its own position and lower ones.
    mask : array, optional
        Bool ``[b, t]``, true for keys that may be seen.
    positions : pair of array or range, optional
        Integer positions of the queries, ``[s]`` or ``[b, s]``, and of the keys, ``[t]`` or ``[b, t]``, or two ranges
        of step 1. By default both are 0, 1, 2, ... They count only if `causal` is true.
    window : int or array, optional
        Number of positions, up to its own, whose keys a query sees, or an array ``[b, s]`` with the number of each
        query; None: all. It counts only if `causal` is true.

    Returns
    -------
    dq : array
        Cotangent of `q`. For a part of the keys it is the part's term of a sum.
    dk : array
        Cotangent of `k`.
    dv : array
        Cotangent of `v`.
    """
    xp, (b, s, a, d), g = namespace(q), q.shape, k.shape[2]
    dk, dv = (xp.zeros(x.shape, dtype=x.dtype) for x in (k, v))
    if 0 in q.shape or 0 in k.shape:
        return xp.zeros_like(q), dk, dv
    do, q, o = (xp.reshape(x, (b, s, g, a // g, d)) for x in (do, q, o))
    statistics, dq = xp.reshape(statistics, (2, b, g, a // g, s)), xp.zeros_like(q)
    visible, (rows, keys) = AttentionMask(causal, mask, positions, window), tiles(q, k, causal)
    for some in rows:
        sums: dict[int, list[Block]] = {}
        for tile in some:
            dx, columns = None, _columns(tile, do, q, o, statistics)
            for which in visible.ranges(tile, keys):
                of_k, of_v = (tile.of_keys(x, which) for x in (k, v))
                scores = visible.hide(_scores(columns[0], of_k), tile, which)
                term, *terms = _terms(scores, of_k, of_v, *columns)
                dx = _plus(dx, term)
                sums[which.start] = list(map(_plus, sums.get(which.start, (None, None)), terms))
            if dx is not None:
                dx *= 1.0 / math.sqrt(d)
                tile.put_queries(dq, dx)
        for which in keys:
            for total, part in zip((dk, dv), sums.get(which.start, ()), strict=False):
                tile.put_keys(total, which, part)
    return xp.reshape(dq, (b, s, a, d)), dk, dv


def _columns(tile: Tile, do: Block, q: Block, o: Block, statistics: Block) -> tuple[Block, ...]:
    """Return a tile's scaled queries and cotangents ``[b, g, n, d]``, its peaks, and sums ``[b, g, 1, n]`` of ``do o``.

    The cotangents are divided by the sums of the softmax here, where that costs least.
    """
    xp, statistics = namespace(q), tile.of_statistics(statistics)
    y = tile.of_queries(do) / xp.matrix_transpose(_divisor(statistics[1, ...]))
    products = xp.vecdot(y, tile.of_queries(o))[..., None, :]
    return tile.of_queries(q) / math.sqrt(q.shape[-1]), y, _finite(statistics[0, ...]), products


def _terms(
    scores: Block, k: Block, v: Block, q: Block, do: Block, peaks: Block, products: Block
) -> tuple[Block, Block, Block]:
    """Return a tile's terms of the cotangents of q (before its scale), k and v. The scores are overwritten."""
    xp = namespace(scores)
    scores -= peaks
    p = xp.exp(scores)
    # V[b, g, t, D] . dO[b, g, D, n] -> dP[b, g, t, n]; dP and P -> dQ, dK, dV, local
    ds = xp.matmul(v, xp.matrix_transpose(do))
    ds -= products
    ds *= p
    return xp.matmul(xp.matrix_transpose(ds), k), xp.matmul(ds, q), xp.matmul(p, do)
