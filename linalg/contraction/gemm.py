"""The product of two blocks, by one matrix product of their own library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from colossal_mpi.grid import Grid
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of
from colossal_mpi.platform import backend, blas
from colossal_mpi.platform.backend import Block

Conj = tuple[bool, bool]
"""Whether the first and the second operand enter as their complex conjugates."""


def result_dtype(block: Block) -> Any:
    """Return the dtype in which products of a block are summed: float32 for the 16-bit floats."""
    return backend.namespace(block).float32 if backend.is_half(block.dtype) else block.dtype


def empty_product(sub: Subscripts, a: Block, size: Mapping[str, int], grid: Grid) -> Block:
    """Return an uninitialised block for the result, laid out so that one matrix product fills it."""
    made = sub.batch + sub.m + sub.n
    shape, dtype = tuple(size[x] for x in made), result_dtype(a)
    block = grid.empty(shape, dtype) if backend.namespace(a) is grid.xp else backend.empty_like(a, shape, dtype)
    return block if made == sub.c else backend.namespace(a).permute_dims(block, tuple(made.index(x) for x in sub.c))


def accumulate(
    sub: Subscripts, a: Block, b: Block, c: Block, alpha: complex = 1, beta: complex = 0, conj: Conj = (False, False)
) -> None:
    """Do ``c = alpha op(a) op(b) + beta c`` on blocks, in place.

    With beta 0 what c holds is not read, and with alpha 0 not what a and b hold.
    """
    if alpha == 0:
        blas.scale(c, beta)
        return
    xp = backend.namespace(a, b)
    size = extents_of(sub, a.shape, b.shape)
    left = _matrix(xp, a, sub.a, (sub.batch, sub.m, sub.k), size)
    right = _matrix(xp, b, sub.b, (sub.batch, sub.k, sub.n), size)
    made = sub.batch + sub.m + sub.n
    whole = xp.permute_dims(c, tuple(sub.c.index(x) for x in made)) if made != sub.c else c
    rows, columns = (math.prod(size[x] for x in letters) for letters in (sub.m, sub.n))
    flat = None if sub.batch else _flat(xp, whole, (rows, columns))
    if flat is not None:
        blas.gemm(left, right, flat, alpha, beta, conj)
        return
    blas.blend(whole, xp.reshape(blas.product(left, right, whole.dtype, conj), whole.shape), alpha, beta)


def _flat(xp: Any, block: Block, shape: tuple[int, int]) -> Block | None:
    """Return `block` as a matrix of this shape in the same memory, None if there is none."""
    if block.shape == shape:
        return block
    try:
        return xp.reshape(block, shape, copy=False)
    except (AttributeError, ValueError):
        return None


def _matrix(xp: Any, block: Block, letters: str, groups: tuple[str, str, str], size: Mapping[str, int]) -> Block:
    """Return `block` as one matrix per batch index: each group of letters becomes one dim."""
    order = "".join(groups)
    if order != letters:
        block = xp.permute_dims(block, tuple(letters.index(x) for x in order))
    shape = tuple(math.prod(size[x] for x in group) for group in groups)
    return xp.reshape(block, shape if groups[0] else shape[1:])
