"""Triangles in half the memory, and small triangular matters of one rank.

The packed form is the rectangle of Gustavson et al.: a lower triangle is split in two, and the transpose of the second
triangle lies above the first, so that packing is a few copies of rectangles and one mask, in any array library.

References
----------
Gustavson, Waśniewski, Dongarra, Langou: Rectangular full packed format for Cholesky's algorithm, ACM TOMS 37, 2010.
"""

from __future__ import annotations

from typing import Any

from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

LEAF = 256
"""Order of the diagonal blocks that are computed whole: of a triangle of order n, ``n (n + LEAF) / 2`` elements are."""

STEP = 64
"""Columns that a triangular solution takes at once."""


def gemm(left: Block, right: Block) -> Block:
    """Return the matrix product of two blocks, by their own library."""
    return backend.namespace(left, right).matmul(left, right)


def lower_product(left: Block, right: Block) -> Block:
    """Return ``left right^T`` of two ``[n, k]`` blocks on and below the diagonal; what lies above is unspecified.

    By halves: two triangles and the square below them, down to blocks of `LEAF`.
    """
    out = backend.zeros_like(left, (left.shape[0], right.shape[0]))
    _fill(out, left, right, 0, left.shape[0])
    return out


def _fill(out: Block, left: Block, right: Block, start: int, stop: int) -> None:
    if stop - start <= LEAF:
        out[start:stop, start:stop] = gemm(left[start:stop, :], right[start:stop, :].T)
        return
    middle = (start + stop) // 2
    _fill(out, left, right, start, middle)
    out[middle:stop, start:middle] = gemm(left[middle:stop, :], right[start:middle, :].T)
    _fill(out, left, right, middle, stop)


def _mask(xp: Any, n: int) -> Block:
    """Return where a square of order n lies on or below its diagonal."""
    return xp.arange(n)[:, None] >= xp.arange(n)[None, :]


def pack(square: Block) -> Block:
    """Return the n(n+1)/2 elements on and below the diagonal of a square block, flat."""
    xp, n = backend.namespace(square), square.shape[0]
    half, odd = (n + 1) // 2, n % 2
    rest = n - half
    whole = backend.empty_like(square, (n + 1 - odd, half))
    whole[1 - odd :, :] = square[:, :half]
    corner = whole[:rest, odd:]
    whole[:rest, odd:] = xp.where(_mask(xp, rest).T, square[half:, half:].T, corner)
    return xp.reshape(whole, (-1,))


def unpack(flat: Block, n: int) -> Block:
    """Return the square of order n whose lower triangle was packed; what lies above is unspecified."""
    xp = backend.namespace(flat)
    half, odd = (n + 1) // 2, n % 2
    whole, out = xp.reshape(flat, (n + 1 - odd, half)), backend.zeros_like(flat, (n, n))
    out[:, :half] = whole[1 - odd :, :]
    out[half:, half:] = whole[: n - half, odd:].T
    return out


def lower(square: Block) -> Block:
    """Return the part of a square on and below its diagonal, zeros above."""
    xp = backend.namespace(square)
    return xp.where(_mask(xp, square.shape[0]), square, xp.zeros_like(square))


def adjoint(block: Block) -> Block:
    """Return the conjugate transpose of a block."""
    return backend.namespace(block).conj(block.T) if backend.numpy_dtype(block.dtype).kind == "c" else block.T


def mirror(square: Block, hermitian: bool) -> Block:
    """Return the symmetric or Hermitian matrix of which `square` holds the lower triangle."""
    xp, mask = backend.namespace(square), _mask(backend.namespace(square), square.shape[0])
    if hermitian and backend.numpy_dtype(square.dtype).kind == "c":
        # A fused multiply and add leaves imaginary rounding on the diagonal
        square = xp.where(mask & mask.T, xp.astype(xp.real(square), square.dtype), square)
        return xp.where(mask, square, xp.conj(square.T))
    return xp.where(mask, square, square.T)


def solve_upper(a: Block, r: Block) -> Block:
    """Return ``a r^-1`` for an upper triangular `r` of order n and `a` ``[m, n]``, by matrix products.

    Block columns from left to right. The blocks on the diagonal are inverted and each solution is refined once, after
    which the product of the result and `r` is `a` to rounding if the condition of `r` is well below 1 / eps.

    References
    ----------
    Higham: Stability of parallel triangular system solvers, SISC 16, 1995.
    """
    xp, out = backend.namespace(a), backend.zeros_like(a, a.shape)
    for start in range(0, r.shape[0], STEP):
        stop = min(start + STEP, r.shape[0])
        rest, corner = a[:, start:stop], r[start:stop, start:stop]
        if start:
            rest = rest - gemm(out[:, :start], r[:start, start:stop])
        inverse = xp.linalg.solve(corner, xp.eye(stop - start, dtype=r.dtype))
        first = gemm(rest, inverse)
        out[:, start:stop] = first + gemm(rest - gemm(first, corner), inverse)
    return out
