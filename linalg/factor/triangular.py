"""Triangular blocks on one rank: packed storage, products of which one triangle is computed, and triangular solution.

The factorizations call it; it moves nothing between ranks and calls the array library of its blocks. The packed form is
the rectangle of Gustavson et al.: a lower triangle is split into a trapezoid and a smaller triangle, and the transpose
of the smaller triangle is stored above the trapezoid. Packing is therefore a few copies of rectangles and one mask, in
any array library.

References
----------
Gustavson, Waśniewski, Dongarra, Langou: Rectangular full packed format for Cholesky's algorithm, ACM TOMS 37, 2010.
"""

from __future__ import annotations

from typing import Any

from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

LEAF = 256
"""Order of the diagonal blocks that are computed whole: ``n (n + LEAF) / 2`` elements of a square of order n."""

STEP = 64
"""Number of columns that a triangular solution computes at once."""


def gemm(left: Block, right: Block) -> Block:
    """Return the matrix product of two blocks of one array library."""
    return backend.namespace(left, right).matmul(left, right)


def lower_product(left: Block, right: Block) -> Block:
    """Return ``left right^T`` of two ``[n, k]`` blocks on and below the diagonal; elements above it are unspecified.

    The triangle is split into two smaller triangles and the square below them, recursively, down to blocks of `LEAF`.
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
    # C[middle:stop, start:middle] = left[middle:stop, K] . right[start:middle, K]^T
    out[middle:stop, start:middle] = gemm(left[middle:stop, :], right[start:middle, :].T)
    _fill(out, left, right, middle, stop)


def _lower_mask(xp: Any, n: int) -> Block:
    """Return a mask that is true on and below the diagonal of a square of order n."""
    return xp.arange(n)[:, None] >= xp.arange(n)[None, :]


def pack(square: Block) -> Block:
    """Return the n(n+1)/2 elements on and below the diagonal of a square block, as a vector."""
    xp, n = backend.namespace(square), square.shape[0]
    half, odd = (n + 1) // 2, n % 2
    rest = n - half
    whole = backend.empty_like(square, (n + 1 - odd, half))
    whole[1 - odd :, :] = square[:, :half]
    corner = whole[:rest, odd:]
    whole[:rest, odd:] = xp.where(_lower_mask(xp, rest).T, square[half:, half:].T, corner)
    return xp.reshape(whole, (-1,))


def unpack(flat: Block, n: int) -> Block:
    """Return the square of order n whose lower triangle was packed; elements above the diagonal are unspecified."""
    xp = backend.namespace(flat)
    half, odd = (n + 1) // 2, n % 2
    whole, out = xp.reshape(flat, (n + 1 - odd, half)), backend.zeros_like(flat, (n, n))
    out[:, :half] = whole[1 - odd :, :]
    out[half:, half:] = whole[: n - half, odd:].T
    return out


def lower(square: Block) -> Block:
    """Return a square with the elements above its diagonal set to zero."""
    xp = backend.namespace(square)
    return xp.where(_lower_mask(xp, square.shape[0]), square, xp.zeros_like(square))


def adjoint(block: Block) -> Block:
    """Return the conjugate transpose of a block."""
    return backend.namespace(block).conj(block.T) if backend.numpy_dtype(block.dtype).kind == "c" else block.T


def mirror(square: Block, hermitian: bool) -> Block:
    """Return the symmetric or Hermitian matrix that has the lower triangle of `square`."""
    xp, mask = backend.namespace(square), _lower_mask(backend.namespace(square), square.shape[0])
    if hermitian and backend.numpy_dtype(square.dtype).kind == "c":
        # A fused multiply-add leaves an imaginary rounding error on the diagonal.
        square = xp.where(mask & mask.T, xp.astype(xp.real(square), square.dtype), square)
        return xp.where(mask, square, xp.conj(square.T))
    return xp.where(mask, square, square.T)


def solve_upper(a: Block, r: Block) -> Block:
    """Return ``a r^-1`` for an upper triangular `r` of order n and `a` ``[m, n]``, by matrix products.

    The block columns are computed from left to right. The diagonal blocks are inverted and each solution is refined
    once. The product of the result and `r` is then `a` to rounding, if the condition of `r` is well below 1 / eps.

    References
    ----------
    Higham: Stability of parallel triangular system solvers, SISC 16, 1995.
    """
    xp, out = backend.namespace(a), backend.zeros_like(a, a.shape)
    for start in range(0, r.shape[0], STEP):
        stop = min(start + STEP, r.shape[0])
        rest, corner = a[:, start:stop], r[start:stop, start:stop]
        if start:
            # A[:, j] - X[:, <j] . R[<j, j]
            rest = rest - gemm(out[:, :start], r[:start, start:stop])
        inverse = xp.linalg.solve(corner, xp.eye(stop - start, dtype=r.dtype))
        # X[:, j] = (A[:, j] - ...) . R[j, j]^-1, and one step of refinement
        first = gemm(rest, inverse)
        out[:, start:stop] = first + gemm(rest - gemm(first, corner), inverse)
    return out
