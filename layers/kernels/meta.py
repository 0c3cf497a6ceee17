"""Kernels of meta grids: the shapes, memory and flop of the reference's kernels, without arithmetic.

`kernels.of` chooses them for meta grids. The reference's other formulas run on meta arrays as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from colossal_mpi.layers.kernels.reference.tiles import attention_scores, largest
from colossal_mpi.meta.array import work
from colossal_mpi.platform.backend import Block, is_half, namespace

_scores = lru_cache(attention_scores)


def _products(q: Block, k: Block, causal: bool, positions: Any, window: Any) -> int:
    """Return the multiplications of one product of queries and keys, over the tiles in which some key is seen."""
    (b, s, a, d), (_, t, g, _) = q.shape, k.shape
    if not b * s * a * t * g:
        return 0
    ranges = positions if positions and isinstance(positions[0], range) else (range(s), range(t))
    if not isinstance(window, int | None):
        window = None  # each query has its own, which no meta array knows: an upper bound
    scores: int = _scores(s, t, a // g, causal, window, ranges[0].start - ranges[1].start)
    return int(b * a * d) * scores


def _tile(q: Block, k: Block, causal: bool, arrays: int) -> None:
    """Allocate and free this number of arrays of a tile's scores, so that the peak of memory counts them."""
    xp, (b, s, a, _), (_, t, g, _) = namespace(q), q.shape, k.shape
    if b * s * a * t * g:
        xp.empty((arrays, largest(b, s, g, a // g, t, causal)), dtype=xp.float32 if is_half(q.dtype) else q.dtype)


def attention(
    q: Block,
    k: Block,
    v: Block,
    causal: bool = True,
    mask: Any = None,
    positions: Any = None,
    window: Any = None,
) -> Any:
    xp, (b, s, a, _) = namespace(q), q.shape
    work(2 * 2 * _products(q, k, causal, positions, window), q, k, v)
    statistics = xp.empty((2, b, a, s, 1), dtype=xp.float32 if is_half(q.dtype) else q.dtype)
    out = xp.empty(q.shape, dtype=q.dtype)
    _tile(q, k, causal, 2)  # scores and their exponentials
    return out, statistics


def attention_backward(
    do: Block,
    q: Block,
    k: Block,
    v: Block,
    o: Block,
    statistics: Block,
    causal: bool = True,
    mask: Any = None,
    positions: Any = None,
    window: Any = None,
) -> Any:
    work(5 * 2 * _products(q, k, causal, positions, window), do, q, k, v, o)
    made = tuple(namespace(x).empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    _tile(q, k, causal, 3)  # scores, probabilities and their cotangents
    return made


def lookup_backward(dy: Block, ids: Block, start: int, count: int) -> Block:
    xp = namespace(dy)
    return xp.empty((count, dy.shape[-1]), dtype=xp.float32 if is_half(dy.dtype) else dy.dtype)
