"""QR factorization of tall matrices, cut by rows.

CholeskyQR is a Gram matrix, its Cholesky factor and a triangular solution: matrix products alone, and one allreduce of
n(n+1)/2 words a pass. A second pass makes Q orthogonal to rounding. Where the Gram matrix is not numerically positive
definite (condition above some 1e8 in float64) a pass with a shifted one comes first. TSQR is a tree of small QR
factorizations over the ranks: it works for any matrix, of any rank.

References
----------
Demmel, Grigori, Hoemmen, Langou: Communication-optimal parallel and sequential QR and LU factorizations, SISC 2012.
Fukaya, Nakatsukasa, Yanagisawa, Yamamoto: CholeskyQR2, ScalA 2014. Fukaya, Kannan, Nakatsukasa, Yamamoto,
Yanagisawa: Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices, SISC 2020.
"""

from __future__ import annotations

from typing import NamedTuple

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, OptionError, ShapeError, SingularError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.factor.packed import adjoint, gemm, solve_upper
from colossal_mpi.linalg.factor.syrk import gram
from colossal_mpi.linalg.factor.tsqr import tsqr
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

METHODS = ("auto", "cholesky", "tsqr")
PASSES = 4
"""Of CholeskyQR at most: a shifted one divides the condition by some 1e6 in float64, and two more follow."""


class QR(NamedTuple):
    """The factors of ``a = q r``."""

    q: DistArray
    r: DistArray


def qr(a: DistArray, method: str = "auto") -> QR:
    """Return the reduced QR factorization of a tall matrix.

    Parameters
    ----------
    a : DistArray, ``[m, n]`` with m >= n, of float or complex dtype
        In any layout. Work is shared by the p ranks that cut it, and redundant along axes that replicate it.
    method : {"auto", "cholesky", "tsqr"}
        ``cholesky``: CholeskyQR2, with shifted passes first where they are needed. ``tsqr``: any matrix, rank-deficient
        ones, too. ``auto``: ``cholesky``, and ``tsqr`` where it fails.

    Returns
    -------
    q : DistArray, ``[m, n]``
        With orthonormal columns, cut by rows as `a` is; axes that cut the columns of `a` cut these rows further.
    r : DistArray, ``[n, n]``
        Upper triangular, replicated, with a non-negative real diagonal: unique if `a` has full rank, so that all
        methods and grids agree.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `a` is no tall matrix of floats, or there is no such method.
    SingularError
        If ``method="cholesky"`` and the columns are dependent to rounding.

    Notes
    -----
    **Communication**, summed over the p ranks that cut the rows: ``cholesky``: an allreduce of n(n+1)/2 words a pass,
    ``n(n+1)(p - 1)``, two passes as a rule and one if the columns are orthonormal already. ``tsqr``: if every rank has
    n rows or more, ``(p - 1) n(n+1)/2`` up the tree, ``(p - 1) n^2`` down it and ``(p - 1) n(n+1)/2`` to replicate R; a
    rank of h < n rows sends hn - h(h-1)/2 and receives hn. Columns that are cut are moved first, by one all_to_all over
    the axes that cut them: a rank receives the part of its rows that it lacks, mn (1 - 1/c) words in all if c ranks cut
    the columns.

    The decision to shift or to give up is agreed on by all ranks of the grid.
    """
    _check(a, method)
    (rows, columns), grid = a.layout.dims, a.grid
    a = a.redistribute(Layout((*rows, *columns), None))
    factors = None if method == "tsqr" else _cholesky_qr(a)
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

    A pass that finds the columns orthonormal to 1/2 leaves them so to rounding.
    """
    xp, q = backend.namespace(a.local), a
    r = None
    for _ in range(PASSES):
        gramian = gram(q).local
        step = _factor(gramian, q)
        if step is None:
            return None
        near = xp.linalg.vector_norm(gramian - xp.eye(a.shape[1], dtype=a.dtype)) <= 0.5
        q, r = q.like(solve_upper(q.local, step)), step if r is None else gemm(step, r)
        if all(comm.collect(bool(near), a.grid)):
            return q, r
    return None


def _factor(gramian: Block, q: DistArray) -> Block | None:
    """Return the upper Cholesky factor of a Gram matrix, of the shifted one if it has none, or None on all ranks."""
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
    """Say, alike on all ranks, whether all have a factor: different processors may round apart on the edge."""
    return all(comm.collect(factor is not None, grid))
