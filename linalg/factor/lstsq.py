"""Least squares by QR. ``linalg`` exports `lstsq`; it calls `qr` and `contract`. The matrix stays put."""

from __future__ import annotations

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, ShapeError, SingularError
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.factor.qr import qr
from colossal_mpi.linalg.factor.triangular import adjoint
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def lstsq(a: DistArray, b: DistArray, layout: Layout | None = None, method: str = "auto") -> DistArray:
    """Return the x that minimises ``||a x - b||``; for a wide `a`, the shortest x with ``a x = b``.

    Parameters
    ----------
    a : DistArray, ``[m, n]``
        A matrix of full rank, of float or complex dtype, in any layout.
    b : DistArray, ``[m]`` or ``[m, r]``
        One right-hand side or several, in any layout on the same grid, of the same dtype.
    layout : Layout, optional
        The layout of the result; replicated by default.
    method : {"auto", "cholesky", "tsqr"}
        The method of `qr`.

    Returns
    -------
    DistArray, ``[n]`` or ``[n, r]``
        The solution in `layout`.

    Raises
    ------
    ShapeError, DTypeError, GridError
        If the shapes, dtypes or grids of the arrays do not fit.
    SingularError
        On all ranks, if `a` does not have full rank to rounding: a diagonal element of R is below ``eps max(m, n)``
        times the greatest.

    Notes
    -----
    **Communication:** the words of `qr`. If m >= n, `b` also moves to the rows of Q, and nr words are allreduced over
    the axes that cut them. If m < n, an allgather brings the mr words of `b` to every rank, and x, which is cut as the
    columns of `a` are, moves to `layout`.

    Examples
    --------
    >>> x = lstsq(a, b)
    >>> residual = norm(a.T @ (a @ x - b))
    """
    _check(a, b)
    single, out = b.ndim == 1, Layout(*[None] * b.ndim) if layout is None else layout
    out.on(a.grid.axes, b.ndim)
    right = b[:, None] if single else b
    x = _tall(a, right, method) if a.shape[0] >= a.shape[1] else _wide(a, right, method)
    # X[as computed] -> X[out]
    return (x[:, 0] if single else x).redistribute(out)


def _check(a: DistArray, b: DistArray) -> None:
    if not (isinstance(a, DistArray) and isinstance(b, DistArray)):
        raise DTypeError(f"lstsq of {type(a).__name__} and {type(b).__name__}: make DistArrays of them")
    if a.grid is not b.grid:
        raise GridError(f"lstsq: a lies on {a.grid} and b on {b.grid}: make both on the same Grid object")
    if a.ndim != 2 or b.ndim not in (1, 2) or a.shape[0] != b.shape[0]:
        raise ShapeError(f"lstsq of shapes {a.shape} and {b.shape}: they must be [m, n] and [m] or [m, r]")
    if a.dtype != b.dtype:
        raise DTypeError(f"lstsq: a is {a.dtype} and b is {b.dtype}: cast one with .astype")


def _tall(a: DistArray, b: DistArray, method: str) -> DistArray:
    """Solve ``R x = Q^H b``."""
    q, r = _regular(a, method)
    axes = dict.fromkeys(q.layout.dims[0], "m")
    # Q^H[N, M_rows] . B[M_rows, R] -> Y[N, R] {U_rows} -> Y[N, R]: allreduce over the rows' axes
    y = contract("mn,mr->nr", q.conj(), b, axes, Layout(None, None))
    # X[N, R] = R^-1[N, N] . Y[N, R], replicated
    return y.like(backend.namespace(r).linalg.solve(r, y.local))


def _wide(a: DistArray, b: DistArray, method: str) -> DistArray:
    """Solve ``R^H y = b`` and return ``x = Q y``, for ``a^H = Q R``."""
    q, r = _regular(a.H, method)
    # B[M, R] on every rank: allgather
    whole = b.redistribute(Layout(None, None))
    y = whole.like(backend.namespace(r).linalg.solve(adjoint(r), whole.local))
    # Q[N_rows, M] . Y[M, R] -> X[N_rows, R]
    return contract("nm,mr->nr", q, y, dict.fromkeys(q.layout.dims[0], "n"), Layout(q.layout.dims[0], None))


def _regular(a: DistArray, method: str) -> tuple[DistArray, Block]:
    """Return Q and the block of R; raise SingularError on all ranks if R says that `a` does not have full rank."""
    q, r = qr(a, method)
    xp = backend.namespace(r.local)
    with comm.agreed(a.grid):
        size = xp.abs(xp.linalg.diagonal(r.local))
        least = max(a.shape) * xp.finfo(r.dtype).eps
        if min(r.shape) and bool(xp.min(size) <= least * xp.max(size)):
            raise SingularError(
                f"lstsq: a of shape {a.shape} must have full rank; the diagonal of its R reaches from "
                f"{float(xp.min(size)):.1e} to {float(xp.max(size)):.1e}: drop dependent columns, or regularise"
            )
    return q, r.local
