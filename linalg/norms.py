"""Norms, inner products, transposes and parts of distributed matrices. Nothing is gathered.

User programs and the factorizations call them. Each computes on the local block and reduces by ``comm``, or calls
`contract` and ``redistribute``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    a : DistArray, ``[m, n]``
        The matrix in any layout; ``"fro"`` and ``"max"`` take an array of any shape.
    order : {"fro", "max", 1, inf}
        The Frobenius norm, the greatest absolute value of an element, the greatest sum of absolute values in a column,
        or the greatest in a row.

    Returns
    -------
    float
        The norm, or NaN if any element is NaN. Sums are made in float64, and squares that would overflow or vanish are
        scaled, so that the norm of any dtype is right wherever float64 holds it.

    Raises
    ------
    OptionError
        If there is no such norm, or `order` is 1 or inf and `a` is no matrix.

    Notes
    -----
    **Communication:** ``fro`` and ``max``: an allreduce of one or two words over the axes that cut `a`; ``fro`` takes a
    second one where the sum of squares is 0 or beyond the range of float64. 1 and inf: also an allreduce of the n
    column sums or m row sums over the axes that cut the other dim.
    """
    if order == "fro":
        return a.norm()
    # A[M, N] {U_partial} -> A[M, N]
    whole, dtype = a.reduced(), backend.numpy_dtype(a.dtype)
    if dtype.name != "float64":
        # the sums, the absolute value of the least integer and that of great complex numbers would overflow
        whole = whole.astype("complex128" if dtype.kind == "c" else "float64")
    size = whole.like(backend.namespace(whole.local).abs(whole.local))
    if order == "max":
        return _greatest(size)
    if order not in (1, math.inf) or a.ndim != 2:
        raise OptionError(f"norm of order {order!r} of shape {a.shape}: use 'fro' or 'max', or 1 or inf of a matrix")
    # A[M_row, N_col] -> sums[N_col] {U_row} -> sums[N_col]: allreduce (order 1; inf with M and N exchanged)
    sums = size.sum_over([0 if order == 1 else 1])
    return _greatest(sums.reduced())


def _greatest(a: DistArray) -> float:
    """Return the greatest element of a non-negative array, 0 if it is empty, NaN if it holds NaN."""
    xp = backend.namespace(a.local)
    missing = xp.isnan(a.local)
    known = xp.where(missing, xp.zeros_like(a.local), a.local)
    top = xp.max(known) if a.local.size else xp.zeros((), dtype=a.dtype)
    pair = xp.stack([xp.astype(top, xp.float64), xp.astype(xp.any(missing), xp.float64)])
    # pair[2] {max over the axes that cut a} -> pair[2]: allreduce
    top, missing = backend.to_host(comm.allreduce(pair, a.grid, a.layout.cut, comm.MAX))
    return math.nan if missing else float(top)


def dot(a: DistArray, b: DistArray) -> complex:
    """Return the inner product ``sum(conj(a) b)``, the same bits on every rank.

    Parameters
    ----------
    a, b : DistArray
        Arrays of one shape, in any layouts on one grid.

    Returns
    -------
    number
        A Python scalar of the kind of the dtype. Products are formed and summed in float32 if the dtype has 16-bit
        floats, in 64 bits if it is an integer or bool.

    Notes
    -----
    **Communication:** an allreduce of a single word, after `b` has moved to the layout of `a`.
    """
    whole = a.reduced()
    # B[its layout] -> B[layout of A]; then sum of A * B {U_axes that cut A} -> allreduce of one word
    other = b.redistribute(whole.layout)
    left, right = (x.like(backend.summable(x.local)) for x in (whole.conj(), other))
    product: complex = (left * right).sum()
    return product


def matvec(a: DistArray, x: DistArray) -> DistArray:
    """Return ``a x``, computed where the blocks of `a` are.

    Parameters
    ----------
    a : DistArray, ``[m, k]``
        The matrix in any layout.
    x : DistArray, ``[k]``
        The vector in any layout on the same grid, of the same dtype.

    Returns
    -------
    DistArray, ``[m]``
        Cut as the rows of `a` are cut, replicated over all other axes.

    Notes
    -----
    **Communication:** `x` moves to the cut of the columns of `a`; the result is allreduced over the axes that cut the
    columns.

    **Adjoint:** ``dx = matvec(a.H, dy)``, and the outer product of dy and conj(x) for `a`.
    """
    whole = a.reduced()
    axes = layout_map("mk", whole.layout)
    # A[M_row, K_col] . x[K_col] -> y[M_row] {U_col} -> y[M_row]: allreduce over col
    return contract("mk,k->m", whole, x, axes, map_layout("m", axes))


def transpose(a: DistArray, layout: Layout | None = None) -> DistArray:
    """Return an array with its dims reversed.

    Parameters
    ----------
    a : DistArray
        The array in any layout.
    layout : Layout, optional
        The layout of the result: ``transpose(a, a.layout)`` is cut as `a` is. By default the layout is reversed with
        the dims; the result is then the view `DistArray.T`.

    Returns
    -------
    DistArray
        The transpose.

    Notes
    -----
    **Communication:** none by default. With a layout, `DistArray.redistribute` from the reversed layout: each rank
    receives the part of its block of the result that it does not hold.

    **Adjoint:** the transpose of the cotangent to the layout of `a`.
    """
    # A[M_row, N_col] -> A.T[N_col, M_row] -> A.T[layout]
    return a.T if layout is None else a.T.redistribute(layout)


def diagonal(a: DistArray) -> DistArray:
    """Return the diagonal of a matrix.

    Parameters
    ----------
    a : DistArray, ``[m, n]``
        The matrix in any layout.

    Returns
    -------
    DistArray, ``[min(m, n)]``
        Cut as the rows of `a` are and partial over the axes that cut its columns; replicated if m > n.

    Raises
    ------
    ShapeError
        If `a` is no matrix.

    Notes
    -----
    **Communication:** none, or an allgather of m words if m > n.
    """
    _require_matrix(a, "diagonal")
    xp, ((r0, r1), (c0, c1)) = backend.namespace(a.local), a.box
    n = min(a.shape)
    low, high = max(r0, c0), min(r1, c1)
    block = backend.zeros_like(a.local, (r1 - r0,))
    if low < high:
        block[low - r0 : high - r0] = xp.linalg.diagonal(a.local[low - r0 : high - r0, low - c0 : high - c0])
    rows, columns = a.layout.dims
    # A[M_row, N_col] -> d[M_row] {U_col}: each rank has the elements of the diagonal that its block holds
    d = DistArray(block, (a.shape[0],), Layout(rows, partial=(*columns, *a.layout.partial)), a.grid)
    if n == a.shape[0]:
        return d
    # d[M_row] {U_col} -> d[M], of which the first n elements are the diagonal
    return DistArray(d.redistribute(Layout(None)).local[:n], (n,), Layout(None), a.grid)


def trace(a: DistArray) -> complex:
    """Return the sum of the diagonal of a matrix, the same bits on every rank.

    Parameters
    ----------
    a : DistArray, ``[m, n]``
        The matrix in any layout.

    Returns
    -------
    number
        A Python scalar of the kind of the dtype; the sum of `DistArray.sum`.

    Notes
    -----
    **Communication:** an allreduce of a single word, and the allgather of `diagonal` if m > n.
    """
    # the ranks' parts of a diagonal are added, and bools cannot be
    countable = a.astype("int8") if backend.numpy_dtype(a.dtype).kind == "b" else a
    # d[M_row] {U_col} -> one word: allreduce
    total: complex = diagonal(countable).sum()
    return total


def tril(a: DistArray, k: int = 0) -> DistArray:
    """Return a matrix with the elements above its k-th diagonal set to zero.

    Parameters
    ----------
    a : DistArray, ``[m, n]``
        The matrix in any layout.
    k : int
        The diagonal, counted upwards from the main diagonal.

    Returns
    -------
    DistArray, ``[m, n]``
        The matrix in the layout of `a`.

    Raises
    ------
    ShapeError
        If `a` is no matrix.

    Notes
    -----
    **Communication:** none.

    **Adjoint:** `tril` of the cotangent.
    """
    return _masked(a, "tril", lambda row, column: column - row <= k)


def triu(a: DistArray, k: int = 0) -> DistArray:
    """Return a matrix with the elements below its k-th diagonal set to zero.

    Parameters
    ----------
    a : DistArray, ``[m, n]``
        The matrix in any layout.
    k : int
        The diagonal, counted upwards from the main diagonal.

    Returns
    -------
    DistArray, ``[m, n]``
        The matrix in the layout of `a`.

    Raises
    ------
    ShapeError
        If `a` is no matrix.

    Notes
    -----
    **Communication:** none.

    **Adjoint:** `triu` of the cotangent.
    """
    return _masked(a, "triu", lambda row, column: column - row >= k)


def _masked(a: DistArray, name: str, keep: Callable[[Block, Block], Block]) -> DistArray:
    _require_matrix(a, name)
    xp, ((r0, r1), (c0, c1)) = backend.namespace(a.local), a.box
    mask = keep(xp.arange(r0, r1)[:, None], xp.arange(c0, c1)[None, :])
    return a.like(xp.where(mask, a.local, xp.zeros_like(a.local)))


def _require_matrix(a: DistArray, name: str) -> None:
    if a.ndim != 2:
        raise ShapeError(f"{name} of shape {a.shape}: it must be a matrix, of 2 dims")
