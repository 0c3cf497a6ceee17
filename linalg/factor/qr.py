"""QR factorization of tall matrices, cut by rows: the choice between CholeskyQR and TSQR, and CholeskyQR.

``linalg`` exports `qr`, and `lstsq` calls it. Every rank's rows stay put; only triangles of order n move.

One pass of CholeskyQR computes a Gram matrix, its Cholesky factor and a triangular solution: matrix products alone, and
one allreduce of n(n+1)/2 words. A second pass makes Q orthogonal to rounding. If the Gram matrix is not numerically
positive definite (condition above about 1e8 in float64), a pass with a shifted Gram matrix comes first. TSQR, in
``tsqr``, is a tree of small QR factorizations over the ranks; it works for any matrix of any rank.

References
----------
Demmel, Grigori, Hoemmen, Langou: Communication-optimal parallel and sequential QR and LU factorizations, SISC 2012.
Fukaya, Nakatsukasa, Yanagisawa, Yamamoto: CholeskyQR2, ScalA 2014. Fukaya, Kannan, Nakatsukasa, Yamamoto,
Yanagisawa: Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices, SISC 2020.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, OptionError, ShapeError, SingularError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.factor.syrk import gram
from colossal_mpi.linalg.factor.triangular import adjoint, gemm, solve_upper
from colossal_mpi.linalg.factor.tsqr import tsqr
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

METHODS = ("auto", "cholesky", "tsqr")
PASSES = 4
"""The greatest number of passes of CholeskyQR: a shifted pass divides the condition by about 1e6, and two follow."""


class QR(NamedTuple):
    """The factors of ``a = q r``.

    Parameters
    ----------
    q : DistArray, ``[m, n]``
        The orthonormal columns.
    r : DistArray, ``[n, n]``
        The upper triangle, replicated.
    """

    q: DistArray
    r: DistArray


def qr(a: DistArray, method: str = "auto") -> QR:
    """Return the reduced QR factorization of a tall matrix.

    Parameters
    ----------
    a : DistArray, ``[m, n]`` with m >= n
        A matrix of float or complex dtype in any layout. The p ranks that cut it share the work; along axes that
        replicate it, all ranks do the same.
    method : {"auto", "cholesky", "tsqr"}
        ``cholesky`` is CholeskyQR2, after shifted passes if they are needed. ``tsqr`` factors any matrix,
        rank-deficient ones included. ``auto`` is ``cholesky``, and ``tsqr`` where that fails.

    Returns
    -------
    QR
        ``q``, with orthonormal columns, is cut by rows as `a` is; axes that cut the columns of `a` cut its rows
        further. ``r`` is upper triangular and replicated. Its diagonal is real and not negative, so that it is unique
        if `a` has full rank, and all methods and grids agree.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `a` is no tall matrix of floats, or there is no such method.
    SingularError
        If ``method="cholesky"`` and the columns are dependent to rounding.

    Notes
    -----
    **Communication:** summed over the p ranks that cut the rows, ``cholesky`` receives ``n(n+1)(p - 1)`` words in each
    pass, by an allreduce: two passes as a rule, one if the columns are orthonormal already. If that fails, an allreduce
    of n words finds the greatest element of each column. If squares overflow or vanish, the passes begin anew with
    scaled columns. ``tsqr`` receives ``(p - 1) n(n+1)/2`` words up the tree, ``(p - 1) n^2`` down the tree and
    ``(p - 1) n(n+1)/2`` in the bcast of R, if every rank has n rows or more; a rank of h < n rows sends hn - h(h-1)/2
    words and receives hn. If c ranks cut the columns, one all_to_all moves ``mn (1 - 1/c)`` words first. All ranks
    agree on whether to shift or to give up.

    Examples
    --------
    >>> q, r = qr(from_global(np.ones((9, 2)), grid, Layout("row", None)), "tsqr")
    """
    _check(a, method)
    (rows, columns), grid = a.layout.dims, a.grid
    # A[M_rows, N_columns] -> A[M_(rows,columns), N]: all_to_all over the columns' axes
    a = a.redistribute(Layout((*rows, *columns), None))
    factors = None
    if method != "tsqr":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # found by _scaled_cholesky_qr
            factors = _cholesky_qr(a)
        factors = factors or _scaled_cholesky_qr(a)
    if factors is None and method == "cholesky":
        raise SingularError(
            f"qr of shape {a.shape} by method='cholesky': the columns are dependent to rounding of {a.dtype}; "
            "use method='tsqr' or 'auto'"
        )
    q, r = tsqr(a) if factors is None else factors
    return QR(q, DistArray(r, (a.shape[1],) * 2, Layout(None, None), grid))


def _check(a: DistArray, method: str) -> None:
    if not isinstance(a, DistArray):
        raise DTypeError(f"qr of {type(a).__name__}: make a DistArray of it")
    if a.ndim != 2 or a.shape[0] < a.shape[1]:
        raise ShapeError(f"qr of shape {a.shape}: it must be a matrix with no more columns than rows; factor its .H")
    if backend.numpy_dtype(a.dtype).name not in ("float32", "float64", "complex64", "complex128"):
        raise DTypeError(f"qr of {a.dtype}: use float32, float64, complex64 or complex128; cast it with .astype")
    if method not in METHODS:
        raise OptionError(f"qr: no method {method!r}; there are {', '.join(METHODS)}")


def _cholesky_qr(a: DistArray) -> tuple[DistArray, Block] | None:
    """Return Q and R by passes of CholeskyQR, None if they do not make Q orthogonal.

    A pass whose Gram matrix is within 1/2 of the identity makes the columns orthonormal to rounding.
    """
    xp, q = backend.namespace(a.local), a
    r = None
    for _ in range(PASSES):
        # Q^H[N, M_rows] . Q[M_rows, N] -> G[N, N] {U_rows} -> G[N, N]: allreduce over the rows' axes
        gramian = gram(q).local
        step = _factor(gramian, q)
        if step is None:
            return None
        near = xp.linalg.vector_norm(gramian - xp.eye(a.shape[1], dtype=a.dtype)) <= 0.5
        # Q[M_rows, N] . S^-1[N, N] -> Q[M_rows, N] and S[N, N] . R[N, N] -> R[N, N], on each rank
        q, r = q.like(solve_upper(q.local, step)), step if r is None else gemm(step, r)
        if all(comm.collect(bool(near), a.grid)):
            return q, r
    return None


def _scaled_cholesky_qr(a: DistArray) -> tuple[DistArray, Block] | None:
    """Return Q and R by CholeskyQR of columns scaled to about 1, None if no column needs that.

    The squares of columns beyond the scale overflow or vanish in the Gram matrix.
    """
    scales = _scales(a)
    if scales is None or (factors := _cholesky_qr(a.like(a.local / scales))) is None:
        return None
    q, r = factors
    # A[M_rows, N] = Q[M_rows, N] . R[N, N] . diag(scales[N]), on each rank
    return q, r * scales


def _scales(a: DistArray) -> Block | None:
    """Return the power of two below the greatest element of each column, None if all squares are within the range."""
    xp, (m, n) = backend.namespace(a.local), a.local.shape
    parts = [xp.real(a.local), xp.imag(a.local)] if backend.numpy_dtype(a.dtype).kind == "c" else [a.local]
    tops = [xp.max(xp.abs(x), axis=0) if m else xp.zeros((n,), dtype=x.dtype) for x in parts]
    # greatest of the columns[N] {max over the rows' axes} -> greatest[N]: allreduce
    greatest = comm.allreduce(xp.max(xp.stack(tops), axis=0), a.grid, a.layout.dims[0], comm.MAX)
    top = backend.to_host(greatest)
    exponents = np.frexp(np.where((top > 0) & np.isfinite(top), top, 1))[1]
    if np.all(abs(exponents) <= np.finfo(top.dtype).maxexp // 3):
        return None
    return xp.astype(backend.to_block(np.ldexp(np.ones_like(top), exponents - 1), greatest), a.dtype)


def _factor(gramian: Block, q: DistArray) -> Block | None:
    """Return the upper Cholesky factor of a Gram matrix, or of the shifted one; None on all ranks if both fail."""
    (m, n), xp = q.shape, backend.namespace(gramian)
    factor = backend.cholesky(gramian)
    if not _everywhere(factor, q.grid):
        factor = None
        if bool(xp.all(xp.isfinite(gramian))):
            unit = xp.finfo(gramian.dtype).eps / 2
            shift = 11 * (m * n + n * (n + 1)) * unit * xp.max(xp.linalg.eigvalsh(gramian))
            factor = backend.cholesky(gramian + shift * xp.eye(n, dtype=gramian.dtype))
        if not _everywhere(factor, q.grid):
            return None
    return adjoint(factor)


def _everywhere(factor: Block | None, grid: Grid) -> bool:
    """Return on all ranks whether all have a factor: processors that round differently may disagree at the edge."""
    return all(comm.collect(factor is not None, grid))
