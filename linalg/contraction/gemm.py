"""The product of two blocks on one rank: one gemm of the blocks' own library, whatever their subscripts are.

`contract` and `execute` call it. It permutes and merges the dims of the blocks into matrices and calls
``platform.blas``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from colossal_mpi.grid import Grid
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of
from colossal_mpi.platform import backend, blas
from colossal_mpi.platform.backend import Block

Conj = tuple[bool, bool]
"""Two flags: True if the first or the second operand enters as its complex conjugate."""


def result_dtype(block: Block) -> Any:
    """Return the dtype in which products of a block are summed: float32 for 16-bit floats, its own otherwise."""
    return backend.namespace(block).float32 if backend.is_half(block.dtype) else block.dtype


def empty_product(sub: Subscripts, a: Block, size: Mapping[str, int], grid: Grid) -> Block:
    """Return an uninitialised block for the result, in the memory order in which one gemm fills it."""
    order = sub.batch + sub.m + sub.n
    shape, dtype = tuple(size[x] for x in order), result_dtype(a)
    block = grid.empty(shape, dtype) if backend.namespace(a) is grid.xp else backend.empty_like(a, shape, dtype)
    return block if order == sub.c else backend.namespace(a).permute_dims(block, tuple(order.index(x) for x in sub.c))


def accumulate(
    sub: Subscripts, a: Block, b: Block, c: Block, alpha: complex = 1, beta: complex = 0, conj: Conj = (False, False)
) -> None:
    """Compute ``c = alpha op(a) op(b) + beta c`` on blocks, in place.

    With beta 0 the contents of `c` are not read, and with alpha 0 the contents of `a` and `b` are not.
    """
    if alpha == 0:
        blas.scale(c, beta)
        return
    xp = backend.namespace(a, b)
    size = extents_of(sub, a.shape, b.shape)
    left = _matrices(xp, a, sub.a, (sub.batch, sub.m, sub.k), size)
    right = _matrices(xp, b, sub.b, (sub.batch, sub.k, sub.n), size)
    order = sub.batch + sub.m + sub.n
    whole = xp.permute_dims(c, tuple(sub.c.index(x) for x in order)) if order != sub.c else c
    rows, columns = (math.prod(size[x] for x in letters) for letters in (sub.m, sub.n))
    flat = None if sub.batch else _view(xp, whole, (rows, columns))
    if flat is not None:
        # c[m, n] = alpha a[m, k] . b[k, n] + beta c[m, n]
        blas.gemm(left, right, flat, alpha, beta, conj)
        return
    # c[batch, m, n] = alpha a[batch, m, k] . b[batch, k, n] + beta c[batch, m, n], through a temporary block
    blas.blend(whole, xp.reshape(blas.product(left, right, whole.dtype, conj), whole.shape), alpha, beta)


def _view(xp: Any, block: Block, shape: tuple[int, int]) -> Block | None:
    """Return a view of `block` as a matrix of this shape, None if its memory has no such view."""
    if block.shape == shape:
        return block
    try:
        return xp.reshape(block, shape, copy=False)
    except (AttributeError, ValueError):
        return None


def _matrices(xp: Any, block: Block, letters: str, groups: tuple[str, str, str], size: Mapping[str, int]) -> Block:
    """Return `block` as one matrix per batch index, each group of letters merged into one dim."""
    order = "".join(groups)
    if order != letters:
        block = xp.permute_dims(block, tuple(letters.index(x) for x in order))
    shape = tuple(math.prod(size[x] for x in group) for group in groups)
    return xp.reshape(block, shape if groups[0] else shape[1:])
