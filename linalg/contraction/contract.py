"""The one matrix product.

``C[m,n] = sum_k A[m,k] B[k,n]`` is an m x n x k box of work. An algorithm is a map from grid axes to the edges of the
box, together with how the operands are stored: SUMMA, 2.5D, 3D and the 1D products differ in nothing else.

Along an axis mapped to m and k, A is cut; along one mapped to n it is gathered. B likewise. C comes out as partial
sums over the k-axes and is reduce-scattered into its layout. Every word moves once:
summed over ranks, ``mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)`` words, with P_m the product of the sizes of the axes
mapped to m, if each operand is stored once, cut further along the axes on which it is gathered (innermost).

References
----------
van de Geijn, Watts: SUMMA, 1997. Agarwal et al.: A three-dimensional approach to parallel matrix multiplication, 1995.
Solomonik, Demmel: Communication-optimal parallel 2.5D matrix multiplication, 2011. Al Daas et al.: Tight memory-
independent parallel matrix multiplication communication lower bounds, SPAA 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, LayoutError, OptionError, ShapeError
from colossal_mpi.layout import Layout, box_shape
from colossal_mpi.linalg.contraction.execute import Work, execute, execute_scattered
from colossal_mpi.linalg.contraction.gemm import accumulate, empty_product, result_dtype
from colossal_mpi.linalg.contraction.operands import Operand, Panels
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of, map_layout, parse
from colossal_mpi.platform import backend, blas
from colossal_mpi.redistribution import stages


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
    """Return ``alpha op(a) op(b) + beta out`` by the algorithm that a map of grid axes describes.

    Parameters
    ----------
    subscripts : str
        A two-operand einsum such as ``"mk,kn->mn"`` or ``"bsk,kn->bsn"``; letters of both operands and the result are
        batch letters. Transposes are subscripts: ``"km,kn->mn"`` is ``a.T @ b``, without a copy.
    a, b : DistArray
        In any layout on one grid, same dtype; redistributed to the map.
    axes : mapping of str to str
        Grid axis to letter. Axes that are not mapped do the product redundantly.
    out : Layout or DistArray, optional
        The layout of the result, or an array of its shape and dtype that it is written into; it may be an operand. By
        default the result stays as the product leaves it: cut along the m- and n-axes, partial over the k-axes.
    alpha, beta : number
        Factors, of the dtype of the operands; a beta other than 0 needs an array `out`. With beta 0 what `out` holds,
        NaN included, is not read, and with alpha 0 the operands are not.
    conj : {"", "a", "b", "ab"}
        The operands that enter as their complex conjugates.
    stream : str, optional
        The letter along which the product is done in panels inside the local range: while one is multiplied the next is
        under way, and no rank holds a gathered operand that has the letter, nor partial sums of the whole result.
        ``k`` keeps C in place (SUMMA), ``n`` keeps A, ``m`` keeps B.
    panel : int
        Greatest number of indices of a panel.
    wide : bool
        Return the product of 16-bit floats in float32, as it was summed. An array `out` keeps its dtype.

    Returns
    -------
    DistArray
        The product in layout `out`, or `out` itself.

    Raises
    ------
    ShapeError, LayoutError, GridError, DTypeError, OptionError
        If letters and shapes, the map and the grid, the two grids, the dtypes, `out` or an option do not fit.

    Notes
    -----
    **Communication:** one redistribution of each operand to the map and one of the result, whole or in panels; see the
    module for words. On one node, large operands are read where their ranks store them, without a copy.
    16-bit floats are summed in float32. **Adjoint:** two contracts with the same map, see `adjoints`.
    """
    sub = parse(subscripts)
    target = out if isinstance(out, DistArray) else None
    layout = out.layout if isinstance(out, DistArray) else out
    _check(sub, a, b, axes)
    shape = tuple(extents_of(sub, a.shape, b.shape)[x] for x in sub.c)
    _check_factors(sub, a, shape, target, (alpha, beta), conj)
    panels = _panels(sub, a, b, axes, stream, panel)
    work = Work(sub, alpha, 0, ("a" in conj, "b" in conj))
    product = _product(work, (a, b), axes, shape, layout, panels, target, beta)
    if product is target:
        return product
    product = product if layout is None else product.redistribute(layout)
    if target is None:
        return product if wide or product.dtype == a.dtype else product.astype(a.dtype)
    blas.blend(target.local, product.local, 1, beta)
    return target


def _product(
    work: Work,
    arrays: Sequence[DistArray],
    axes: Mapping[str, str],
    shape: tuple[int, ...],
    layout: Layout | None,
    panels: Panels,
    target: DistArray | None,
    beta: complex,
) -> DistArray:
    """Return the product as the map leaves it, partly reduced if it is done in panels, or `target` if that fits."""
    sub, grid = work.sub, arrays[0].grid
    made = map_layout(sub.c, axes, sub.k).on(grid.axes, len(sub.c))
    if not panels.letter and all(_in_place(x, y, axes) for x, y in zip((sub.a, sub.b), arrays, strict=True)):
        return _local(work, arrays, shape, made, target, beta)
    operands = [
        _operand(letters, array, axes, panels, side)
        for letters, array, side in zip((sub.a, sub.b), arrays, "ab", strict=True)
    ]
    whole = not panels.letter and _thin(sub, operands, shape, made)
    left, right = (x.moved() if whole or not (panels.letter or x.large) else x for x in operands)
    if layout is not None and panels.cuts(sub.c):
        wanted = layout.on(grid.axes, len(sub.c))
        if stages(made, wanted)[0]:
            return execute_scattered(work, (left, right), shape, made, wanted)
    box = made.box(shape, grid.axes, grid.coords)
    if target is not None and target.layout == made and _writable(target, arrays):
        work.beta = beta
        execute(work, (left, right), target.local, box)
        return target
    local = {x: stop - start for x, (start, stop) in zip(sub.c, box, strict=True)}
    c = empty_product(sub, arrays[0].local, local, grid)
    execute(work, (left, right), c, box)
    return DistArray(c, shape, made, grid)


def _in_place(letters: str, array: DistArray, axes: Mapping[str, str]) -> bool:
    return array.layout == map_layout(letters, axes).on(array.grid.axes, array.ndim)


def _local(
    work: Work,
    arrays: Sequence[DistArray],
    shape: tuple[int, ...],
    made: Layout,
    target: DistArray | None,
    beta: complex,
) -> DistArray:
    """Return the product of two blocks that are what the map asks for, or `target` if it fits."""
    sub, (a, b) = work.sub, (array.local for array in arrays)
    if target is not None and target.layout == made and _writable(target, arrays):
        accumulate(sub, a, b, target.local, work.alpha, beta, work.conj)
        return target
    c = empty_product(sub, a, extents_of(sub, a.shape, b.shape), arrays[0].grid)
    accumulate(sub, a, b, c, work.alpha, 0, work.conj)
    return DistArray(c, shape, made, arrays[0].grid)


def _writable(target: DistArray, arrays: Sequence[DistArray]) -> bool:
    """Say whether the product may be summed in `target` while the operands are read.

    Each rank decides for itself: nothing that is communicated depends on it, and empty blocks overlap no others.
    """
    overlap = getattr(backend.namespace(target.local), "may_share_memory", None)  # beyond the array API
    if overlap is None or target.dtype != result_dtype(arrays[0].local):
        return False
    return not any(overlap(target.local, array.local) for array in arrays)


def _operand(letters: str, array: DistArray, axes: Mapping[str, str], panels: Panels, side: str) -> Operand:
    """Return an operand without partial sums."""
    wanted = map_layout(letters, axes).on(array.grid.axes, array.ndim)
    array = array.redistribute(stages(array.layout, wanted)[1].with_partial())
    return Operand(letters, array, wanted, panels, side, any(axis not in axes for axis in array.layout.cut))


def _thin(sub: Subscripts, operands: Sequence[Operand], shape: tuple[int, ...], made: Layout) -> bool:
    """Say whether the summed letters are so short that their pieces had better be laid side by side.

    Each further piece reads and writes the result once more; laid side by side, the operands are copied once instead.
    """
    again = max(operand.parts(sub.k) for operand in operands) - 1
    result = math.prod(box_shape(made.box(shape, operands[0].array.grid.axes, operands[0].first)))
    return sum(operand.largest for operand in operands) < 2 * again * result


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
    """Refuse on all ranks a factor that would be cut short, or that only ranks with something to multiply would see."""
    kind, real = dtype.kind, float(np.real(value))
    fits = kind == "c" or np.imag(value) == 0
    if kind in "biu":
        low, high = (0, 1) if kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        fits = fits and real.is_integer() and low <= real <= high
    if not fits:
        raise DTypeError(f"contract({sub}): {name}={value} is no {dtype}: cast the operands with .astype first")
