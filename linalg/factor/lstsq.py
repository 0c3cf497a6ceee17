"""Least squares by QR."""

from __future__ import annotations

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, ShapeError, SingularError
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.factor.packed import adjoint
from colossal_mpi.linalg.factor.qr import qr
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def lstsq(a: DistArray, b: DistArray, layout: Layout | None = None, method: str = "auto") -> DistArray:
    """Return x that makes ``||a x - b||`` least; of a wide `a`, the shortest x with ``a x = b``.

    Parameters
    ----------
    a : DistArray, ``[m, n]``, of full rank
    b : DistArray, ``[m]`` or ``[m, r]``
        One right-hand side or several. In any layouts on one grid, same dtype.
    layout : Layout, optional
        Of the result; replicated by default.
    method : str
        Of `qr`.

    Returns
    -------
    DistArray, ``[n]`` or ``[n, r]``

    Raises
    ------
    ShapeError, DTypeError, GridError
        If the arrays do not fit.
    SingularError
        On all ranks, if `a` has not full rank to rounding: a diagonal element of R is below ``eps max(m, n)`` times the
        greatest.

    Notes
    -----
    **Communication:** that of `qr`. If m >= n: `b` moves to the rows of Q, and an allreduce of nr words over the axes
    that cut them. Else: `b` is gathered, mr words on each rank, and x, which lies as the columns of `a`, moves to
    `layout`.
    """
    _check(a, b)
    single, out = b.ndim == 1, Layout(*[None] * b.ndim) if layout is None else layout
    out.on(a.grid.axes, b.ndim)
    right = b[:, None] if single else b
    x = _tall(a, right, method) if a.shape[0] >= a.shape[1] else _wide(a, right, method)
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
    turned = contract("mn,mr->nr", q.conj(), b, axes, Layout(None, None))
    return turned.like(backend.namespace(r).linalg.solve(r, turned.local))


def _wide(a: DistArray, b: DistArray, method: str) -> DistArray:
    """Solve ``R^H y = b`` and return ``x = Q y``, for ``a^H = Q R``."""
    q, r = _regular(a.H, method)
    whole = b.redistribute(Layout(None, None))
    y = whole.like(backend.namespace(r).linalg.solve(adjoint(r), whole.local))
    return contract("nm,mr->nr", q, y, dict.fromkeys(q.layout.dims[0], "n"), Layout(q.layout.dims[0], None))


def _regular(a: DistArray, method: str) -> tuple[DistArray, Block]:
    """Return Q and the block of R, whose diagonal says, alike on all ranks, whether the rank is full."""
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
