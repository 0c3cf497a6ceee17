"""`contract`, the one distributed matrix product: its arguments and their checks.

``C[m, n] = sum_k A[m, k] B[k, n]`` is a box of work, m x n x k. An algorithm is a map from grid axes to the edges of
the box, together with the layouts in which the matrices are stored: SUMMA, 2.5D, 3D and the 1D products differ in
nothing else. Along an axis that is mapped to m or k, A is cut; along an axis that is mapped to n, A is gathered. The
same holds for B with the letters exchanged. C comes out as partial sums over the k-axes and is reduce-scattered into
its layout::

    # A[M_row, K_(depth,col)] . B[K_(depth,row), N_col] -> C[M_row, N_col] {U_depth} -> C[M_(row,depth), N_col]

With P_m the product of the sizes of the axes that are mapped to m, and each matrix stored once, cut further along the
axes over which it is gathered (innermost), every word moves once: ``mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)`` words are
received, summed over ranks.

``linalg.matmul``, the factorizations and all layers call `contract`. It checks the arguments and calls ``execute``,
which holds the algorithm.

References
----------
van de Geijn, Watts: SUMMA, 1997. Agarwal et al.: A three-dimensional approach to parallel matrix multiplication, 1995.
Solomonik, Demmel: Communication-optimal parallel 2.5D matrix multiplication, 2011. Al Daas et al.: Tight memory-
independent parallel matrix multiplication communication lower bounds, SPAA 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from colossal_mpi.comm import check
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, LayoutError, OptionError, ShapeError
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.execute import LocalProduct, execute
from colossal_mpi.linalg.contraction.operands import Panels
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of, parse
from colossal_mpi.platform import backend, blas


def contract(
    subscripts: str,
    a: DistArray,
    b: DistArray,
    axes: Mapping[str, str],
    out: Layout | DistArray | None = None,
    *,
    alpha: complex = 1,
    beta: complex = 0,
    conj: str = "",
    stream: str | None = None,
    panel: int = 256,
    wide: bool = False,
) -> DistArray:
    """Return ``alpha op(a) op(b) + beta out``, computed by the algorithm that a map of grid axes describes.

    Parameters
    ----------
    subscripts : str
        A two-operand einsum such as ``"mk,kn->mn"`` or ``"bsk,kn->bsn"``. Letters of both operands and the result are
        batch letters. Transposes are subscripts: ``"km,kn->mn"`` is ``a.T @ b`` without a copy.
    a, b : DistArray
        The operands, with one dim per letter, in any layout on one grid and of one dtype. They are redistributed to the
        map.
    axes : mapping of str to str
        Grid axis to letter. Along axes that are not mapped, all ranks compute the same product.
    out : Layout or DistArray, optional
        The layout of the result, or an array of its shape and dtype to write the result into, which may be an operand.
        By default the result stays where it is computed: cut over the m- and n-axes, partial over the k-axes.
    alpha, beta : number
        Factors that the dtype of the operands can hold. A beta other than 0 needs an array `out`. With beta 0 the
        contents of `out`, NaN included, are not read, and with alpha 0 the contents of the operands are not.
    conj : {"", "a", "b", "ab"}
        The operands that enter as their complex conjugates.
    stream : str, optional
        The letter along which each rank's range is divided into panels. While one panel is multiplied the next is under
        way, and no rank holds a whole gathered operand with this letter, nor partial sums of a whole result with it.
        ``k`` keeps C stationary (SUMMA), ``n`` keeps A, ``m`` keeps B.
    panel : int
        The greatest number of indices in a panel.
    wide : bool
        Whether to return the product of 16-bit floats in float32, the dtype in which it is summed. An array `out` keeps
        its dtype.

    Returns
    -------
    DistArray
        The product in layout `out`, or `out` itself.

    Raises
    ------
    ShapeError
        If letters and shapes do not fit, or beta has no array `out`.
    GridError
        If the arrays lie on several grids, or the grid has no such axis.
    LayoutError
        If an axis is mapped to a letter that is not in the subscripts, or `out` does not fit the grid.
    DTypeError
        If the dtypes differ, or the dtype cannot hold alpha or beta.
    OptionError
        If `stream` or `panel` does not fit.

    Notes
    -----
    **Communication:** an allgather of a over the n-axes, an allgather of b over the m-axes and a reduce_scatter of the
    result over the k-axes, whole or in panels. If each is stored once, ``mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)``
    words are received, summed over ranks, where P_x is the number of parts of x. Operands in other layouts move to
    these first. On one node, large operands are read where their ranks store them, without a copy.

    **Adjoint:** two contracts with the same map, see `adjoints`.

    16-bit floats are summed in float32.

    Examples
    --------
    >>> c = contract("bsk,kn->bsn", x, w, {"row": "b", "col": "n"}, Layout("row", None, "col"))
    """
    sub = parse(subscripts)
    target = out if isinstance(out, DistArray) else None
    layout = out.layout if isinstance(out, DistArray) else out
    _check(sub, a, b, axes)
    shape = tuple(extents_of(sub, a.shape, b.shape)[x] for x in sub.c)
    _check_factors(sub, a, shape, target, (alpha, beta), conj)
    panels = _panels(sub, a, b, axes, stream, panel)
    product = LocalProduct(sub, alpha, 0, ("a" in conj, "b" in conj))
    with _checked(sub, a, b, axes, layout):
        # A[M, K] . B[K, N] -> C[M_m-axes, N_n-axes] {U_k-axes}
        c = execute(product, (a, b), axes, shape, layout, panels, target, beta)
        if c is target:
            return c
        # C[M_m-axes, N_n-axes] {U_k-axes} -> C[out]: reduce_scatter, and a move if the cuts differ
        c = c if layout is None else c.redistribute(layout)
    if target is None:
        return c if wide or c.dtype == a.dtype else c.astype(a.dtype)
    # out = C + beta out, on each rank
    blas.blend(target.local, c.local, 1, beta)
    return target


def _checked(
    sub: Subscripts, a: DistArray, b: DistArray, axes: Mapping[str, str], layout: Layout | None
) -> AbstractContextManager[None]:
    """Return the context in which the ranks that take part in a product have agreed on it, where calls are checked."""
    if not check.checking():
        return nullcontext()
    layouts = [a.layout, b.layout, *([] if layout is None else [layout])]
    group = dict.fromkeys([*axes, *(axis for one in layouts for axis in (*one.cut, *one.partial))])
    return check.call(f"contract({sub})", a.grid, list(group), a=a, b=b, map=dict(axes), to=layout)


def _panels(
    sub: Subscripts, a: DistArray, b: DistArray, axes: Mapping[str, str], stream: str | None, width: int
) -> Panels:
    if stream is None:
        return Panels()
    extents = extents_of(sub, a.shape, b.shape)
    if stream not in extents or len(stream) != 1:
        raise OptionError(f"contract({sub}): stream={stream!r} is no letter of it; use one of {', '.join(extents)}")
    if width < 1:
        raise OptionError(f"contract({sub}): panel={width}: a panel has at least one index")
    mapped = tuple(axis for axis, letter in axes.items() if letter == stream and a.grid.axes[axis] > 1)
    return Panels.of(stream, extents[stream], mapped, a.grid, width)


def _check(sub: Subscripts, a: DistArray, b: DistArray, axes: Mapping[str, str]) -> None:
    if not (isinstance(a, DistArray) and isinstance(b, DistArray)):
        raise DTypeError(
            f"contract({sub}): operands are {type(a).__name__} and {type(b).__name__}: make DistArrays of them"
        )
    if a.grid is not b.grid:
        raise GridError(f"contract({sub}): a lies on {a.grid} and b on {b.grid}: make both on the same Grid object")
    for letters, array, name in ((sub.a, a, "a"), (sub.b, b, "b")):
        if len(letters) != array.ndim:
            raise ShapeError(
                f"contract({sub}): {name} has {array.ndim} dims {array.shape} for letters {letters!r}; "
                "write one letter per dim"
            )
    for x in sub.batch + sub.k:
        left, right = a.shape[sub.a.index(x)], b.shape[sub.b.index(x)]
        if left != right:
            raise ShapeError(f"contract({sub}): {x} of a ({left}) and {x} of b ({right}) must be equal, on {a.grid}")
    if a.dtype != b.dtype:
        raise DTypeError(f"contract({sub}): a is {a.dtype} and b is {b.dtype}: cast one with .astype")
    for axis, letter in axes.items():
        if axis not in a.grid.axes:
            raise GridError(f"contract({sub}): no axis {axis!r} on {a.grid}; map axes of it")
        if letter not in {*sub.a, *sub.b}:
            raise LayoutError(
                f"contract({sub}): axis {axis!r} is mapped to {letter!r}; "
                f"use one of {', '.join(dict.fromkeys(sub.a + sub.b))}"
            )


def _check_factors(
    sub: Subscripts,
    a: DistArray,
    shape: tuple[int, ...],
    target: DistArray | None,
    factors: tuple[complex, complex],
    conj: str,
) -> None:
    alpha, beta = factors
    if conj not in ("", "a", "b", "ab", "ba"):
        raise DTypeError(f"contract({sub}): conj={conj!r}: name the operands to conjugate, 'a', 'b' or 'ab'")
    if (alpha, beta) != (1, 0):
        for name, value in (("alpha", alpha), ("beta", beta)):
            _require_factor(sub, name, value, backend.numpy_dtype(a.dtype))
    if target is None:
        if beta != 0:
            raise ShapeError(f"contract({sub}): beta={beta} needs an array out= to be added to")
        return
    if target.grid is not a.grid:
        raise GridError(f"contract({sub}): out lies on {target.grid} and a on {a.grid}: make both on one Grid object")
    if target.shape != shape or target.dtype != a.dtype:
        raise ShapeError(
            f"contract({sub}): out must be {a.dtype}{shape}, as the result, and is {target.dtype}{target.shape}"
        )


def _require_factor(sub: Subscripts, name: str, value: complex, dtype: np.dtype) -> None:
    """Raise on all ranks if the dtype cannot hold a factor; otherwise only ranks with a non-empty block would fail."""
    kind, real = dtype.kind, float(np.real(value))
    fits = kind == "c" or np.imag(value) == 0
    if kind in "biu":
        low, high = (0, 1) if kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = fits and real.is_integer() and low <= real <= high
    if not fits:
        raise DTypeError(f"contract({sub}): {name}={value} is no {dtype}: cast the operands with .astype first")
