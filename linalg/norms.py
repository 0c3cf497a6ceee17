"""Norms, inner products, transposes and parts of distributed matrices. Nothing is gathered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import layout_map, map_layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def norm(a: DistArray, order: str | float = "fro") -> float:
    """Return a norm of a matrix, the same bits on every rank.

    Parameters
    ----------
    a : DistArray, ``[m, n]``; any shape for ``"fro"`` and ``"max"``
    order : {"fro", "max", 1, inf}
        Frobenius; greatest element; greatest sum of a column; greatest sum of a row, all of absolute values.

    Notes
    -----
    **Communication:** ``fro``, ``max``: one allreduce of one or two words; 1 and inf: one of the n column or m row sums
    over the axes that cut the other dim, too. NaN anywhere gives NaN.

    Raises
    ------
    OptionError
        If `order` is none of these, or one of a matrix alone and `a` is none.
    """
    if order == "fro":
        return a.norm()
    whole = a.reduced()
    size = whole.like(backend.namespace(whole.local).abs(whole.local))
    if order == "max":
        return _greatest(size)
    if order not in (1, math.inf) or a.ndim != 2:
        raise OptionError(f"norm of order {order!r} of shape {a.shape}: use 'fro' or 'max', or 1 or inf of a matrix")
    sums = size.sum_over([0 if order == 1 else 1])
    return _greatest(sums.reduced())


def _greatest(a: DistArray) -> float:
    """Return the greatest element of a non-negative array, 0 of an empty one, NaN of one that holds NaN."""
    xp = backend.namespace(a.local)
    missing = xp.isnan(a.local)
    known = xp.where(missing, xp.zeros_like(a.local), a.local)
    top = xp.max(known) if a.local.size else xp.zeros((), dtype=a.dtype)
    pair = xp.stack([xp.astype(top, xp.float64), xp.astype(xp.any(missing), xp.float64)])
    top, missing = backend.to_host(comm.allreduce(pair, a.grid, a.layout.cut, comm.MAX))
    return math.nan if missing else float(top)


def dot(a: DistArray, b: DistArray) -> Any:
    """Return the inner product ``sum(conj(a) b)`` of arrays of one shape, the same bits on every rank.

    **Communication:** one allreduce of a single word, after the move of `b` to the layout of `a` if they differ.
    """
    xp = backend.namespace(a.local)
    whole = a.reduced()
    left = whole.like(xp.conj(whole.local)) if backend.numpy_dtype(a.dtype).kind == "c" else whole
    return (left * b.redistribute(whole.layout)).sum()


def matvec(a: DistArray, x: DistArray) -> DistArray:
    """Return ``a x``, computed where `a` lies: cut as its rows are cut, replicated over all other axes.

    Parameters
    ----------
    a : DistArray, ``[m, k]``
    x : DistArray, ``[k]``

    **Communication:** `x` is moved to the cut of the columns of `a`; the result is allreduced over the axes that cut
    them.
    """
    whole = a.reduced()
    axes = layout_map("mk", whole.layout)
    return contract("mk,k->m", whole, x, axes, map_layout("m", axes))


def transpose(a: DistArray, layout: Layout | None = None) -> DistArray:
    """Return an array with its dims reversed.

    Parameters
    ----------
    a : DistArray
    layout : Layout, optional
        Of the result: ``transpose(a, a.layout)`` lies as `a` does. By default nothing moves and the layout is reversed
        with the dims, which is `DistArray.T`, a view.

    **Communication:** that of `DistArray.redistribute` from the reversed layout: each rank receives what its block of
    the result lacks. **Adjoint:** the transpose of the cotangent to the layout of `a`.
    """
    return a.T if layout is None else a.T.redistribute(layout)


def diagonal(a: DistArray) -> DistArray:
    """Return the diagonal of a matrix, cut as its rows are and partial over the axes that cut its columns.

    That of a tall matrix, with fewer columns than rows, is replicated.

    **Communication:** none; an allgather of m words if the matrix is tall.
    """
    _matrix(a, "diagonal")
    xp, ((r0, r1), (c0, c1)) = backend.namespace(a.local), a.box
    n = min(a.shape)
    low, high = max(r0, c0), min(r1, c1)
    block = backend.zeros_like(a.local, (r1 - r0,))
    if low < high:
        block[low - r0 : high - r0] = xp.linalg.diagonal(a.local[low - r0 : high - r0, low - c0 : high - c0])
    rows, columns = a.layout.dims
    whole = DistArray(block, (a.shape[0],), Layout(rows, partial=(*columns, *a.layout.partial)), a.grid)
    return whole if n == a.shape[0] else _head(whole, n)


def _head(a: DistArray, n: int) -> DistArray:
    """Return the first n elements of a vector, replicated over the axes that cut it."""
    whole = a.redistribute(Layout(None))
    return DistArray(whole.local[:n], (n,), Layout(None), a.grid)


def trace(a: DistArray) -> Any:
    """Return the sum of the diagonal, the same bits on every rank. **Communication:** an allreduce of a single word."""
    return diagonal(a).sum()


def tril(a: DistArray, k: int = 0) -> DistArray:
    """Return the part of a matrix on and below its k-th diagonal, zeros elsewhere. **Communication:** none."""
    return _masked(a, "tril", lambda row, column: column - row <= k)


def triu(a: DistArray, k: int = 0) -> DistArray:
    """Return the part of a matrix on and above its k-th diagonal, zeros elsewhere. **Communication:** none."""
    return _masked(a, "triu", lambda row, column: column - row >= k)


def _masked(a: DistArray, name: str, keep: Callable[[Block, Block], Block]) -> DistArray:
    _matrix(a, name)
    xp, ((r0, r1), (c0, c1)) = backend.namespace(a.local), a.box
    mask = keep(xp.arange(r0, r1)[:, None], xp.arange(c0, c1)[None, :])
    return a.like(xp.where(mask, a.local, xp.zeros_like(a.local)))


def _matrix(a: DistArray, name: str) -> None:
    if a.ndim != 2:
        raise ShapeError(f"{name} of shape {a.shape}: it must be a matrix, of 2 dims")
