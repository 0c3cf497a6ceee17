"""Softmax attention in tiles of queries and keys: no s x s array is ever made.

References
----------
Milakov & Gimelshein: Online normalizer calculation for softmax, 2018. Rabe & Staats: Self-attention does not need
O(n^2) memory, 2021. Dao et al.: FlashAttention, 2022. Ainslie et al.: GQA, 2023.
"""

from __future__ import annotations

import itertools
import math

from colossal_mpi.layers.kernels.reference.tiles import Order, Positions, Tile, tiles
from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.platform.backend import Block, namespace

State = tuple[Block, Block, Block]
"""``sum_j exp(score_j - peak) v_j [b, g, n, d]``, the peaks ``[b, g, 1, n]`` and ``sum_j exp(score_j - peak)``."""


def attention(
    q: Block, k: Block, v: Block, causal: bool = True, mask: Block | None = None, positions: Positions = None
) -> tuple[Block, Block]:
    """Return softmax attention, and the peaks and sums of its scores.

    The keys may be a part of all keys: `attention_merge` puts the results of several parts together, and
    `attention_backward` takes one part after the other.

    Parameters
    ----------
    q : array, ``[b, s, a, d]``
    k, v : array, ``[b, t, g, d]``
        g divides a: head i of q sees head ``i // (a / g)`` of k and v. With g = a it is multi-head attention.
    causal : bool
        Whether a query sees only the keys whose position is its own or lower.
    mask : bool array, ``[b, t]``, optional
        The keys that are seen.
    positions : pair of integer arrays, optional
        Of the queries, ``[s]`` or ``[b, s]``, and of the keys, ``[t]`` or ``[b, t]``; 0, 1, 2, ... of both by default.
        They count only in a causal order.

    Returns
    -------
    out : array, ``[b, s, a, d]``
        In the dtype of q; zeros for a query that sees no key.
    statistics : array, ``[2, b, a, s, 1]``
        The greatest score of each query, its peak, and the sum of ``exp(score - peak)``: minus infinity and 0 for a
        query that sees no key. (The logarithm of the sum added to the peak would lose it where the peak is large.) In
        float32 where q is of 16 bits. Another provider may return any peak and sum of the same ``peak + log(sum)``.
    """
    xp, (b, s, a, d), g = namespace(q), q.shape, k.shape[2]
    if 0 in q.shape or 0 in k.shape:
        return xp.zeros_like(q), _nothing(q, (b, a, s, 1))
    q, order = xp.reshape(q, (b, s, g, a // g, d)), Order(causal, mask, positions)
    out, statistics = xp.zeros_like(q), _nothing(q, (b, g, a // g, s))
    rows, keys = tiles(q, k, causal)
    for tile in itertools.chain.from_iterable(rows):
        x, state = tile.of_queries(q) / math.sqrt(d), None
        for which in order.seen(tile, keys):
            scores = order.hide(_scores(x, tile.of_keys(k, which)), tile, which)
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
    """Return peaks, those of no score as 0, so that differences to them are numbers."""
    xp = namespace(peaks)
    return xp.where(peaks == -math.inf, xp.zeros_like(peaks), peaks)


def _divisor(sums: Block) -> Block:
    """Return sums, those of no score as 1."""
    xp = namespace(sums)
    return xp.where(sums == 0.0, xp.ones_like(sums), sums)


def _sums(scores: Block, v: Block) -> State:
    """Return the sums over the keys of scores ``[b, g, t, n]``, which are overwritten."""
    xp = namespace(scores)
    peaks = xp.max(scores, axis=-2, keepdims=True)
    scores -= _finite(peaks)
    p = xp.exp(scores)
    ones = xp.ones((1, p.shape[-2]), dtype=p.dtype)
    return xp.matmul(xp.matrix_transpose(p), v), peaks, xp.matmul(ones, p)


def _shrink(left: Block, right: Block) -> tuple[Block, Block, Block]:
    """Return the greater of two peaks, and the factors of what was summed under each of them."""
    xp = namespace(left)
    peaks = xp.maximum(left, right)
    return peaks, xp.exp(left - _finite(peaks)), xp.exp(right - _finite(peaks))


def _merge(a: State | None, b: State) -> State:
    """Return the sums over the keys of both, in their memory."""
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
    """Return attention to two parts of the keys together, from the pairs that `attention` returns for each."""
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
) -> tuple[Block, Block, Block]:
    """Return the cotangents of q, k and v; the probabilities are made again from the statistics.

    Parameters
    ----------
    do : array, ``[b, s, a, d]``
        The cotangent of the output.
    q, k, v, causal, mask, positions
        As `attention` takes them. Where k and v are a part of all keys, so are their cotangents, and that of q is the
        part's term of a sum.
    o, statistics : array
        What `attention` or `attention_merge` returned, for all keys.
    """
    xp, (b, s, a, d), g = namespace(q), q.shape, k.shape[2]
    dk, dv = (xp.zeros(x.shape, dtype=x.dtype) for x in (k, v))
    if 0 in q.shape or 0 in k.shape:
        return xp.zeros_like(q), dk, dv
    do, q, o = (xp.reshape(x, (b, s, g, a // g, d)) for x in (do, q, o))
    statistics, dq = xp.reshape(statistics, (2, b, g, a // g, s)), xp.zeros_like(q)
    order, (rows, keys) = Order(causal, mask, positions), tiles(q, k, causal)
    for some in rows:
        sums: dict[int, list[Block]] = {}
        for tile in some:
            dx, columns = None, _columns(tile, do, q, o, statistics)
            for which in order.seen(tile, keys):
                of_k, of_v = (tile.of_keys(x, which) for x in (k, v))
                scores = order.hide(_scores(columns[0], of_k), tile, which)
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
    """Return a tile's queries, scaled, and cotangents ``[b, g, n, d]``; peaks and sums ``[b, g, 1, n]`` of ``do o``.

    What the sums of the softmax divide is divided by them here, where it is smallest.
    """
    xp, statistics = namespace(q), tile.of_statistics(statistics)
    y = tile.of_queries(do) / xp.matrix_transpose(_divisor(statistics[1, ...]))
    products = xp.vecdot(y, tile.of_queries(o))[..., None, :]
    return tile.of_queries(q) / math.sqrt(q.shape[-1]), y, _finite(statistics[0, ...]), products


def _terms(
    scores: Block, k: Block, v: Block, q: Block, do: Block, peaks: Block, products: Block
) -> tuple[Block, Block, Block]:
    """Return the terms of the cotangents of q (scaled), k and v from one tile; its scores are overwritten."""
    xp = namespace(scores)
    scores -= peaks
    p = xp.exp(scores)
    ds = xp.matmul(v, xp.matrix_transpose(do))
    ds -= products
    ds *= p
    return xp.matmul(xp.matrix_transpose(ds), k), xp.matmul(ds, q), xp.matmul(p, do)
