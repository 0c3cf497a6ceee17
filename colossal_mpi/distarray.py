"""Distributed arrays: a global shape, a layout on a grid, and this rank's block.

``linalg`` multiplies such arrays, layers compute on them and checkpoints store them. The module calls
`colossal_mpi.redistribution` to move them between layouts and `colossal_mpi.comm` to sum their numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from colossal_mpi import comm, dlpack
from colossal_mpi.errors import GridError, LayoutError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, box_shape, index_of
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution import Plan, gather_to_root, plan_of, redistribute, select, start

Number: TypeAlias = complex | np.generic
"""A Python or NumPy number."""
_matmul: Callable[[DistArray, DistArray], DistArray] | None = None


def register_matmul(function: Callable[[DistArray, DistArray], DistArray]) -> None:
    """Make ``A @ B`` call a function; linalg registers its product here, because this module cannot import linalg."""
    global _matmul
    _matmul = function


class DistArray:
    """A global array of which each rank holds one block.

    Parameters
    ----------
    local : array
        This rank's block, of the shape that the layout gives it (NumPy, CuPy or another library of the array API).
    shape : tuple of int
        The global shape.
    layout : Layout
        The axes of the grid that cut each dim, and those over which the blocks are partial sums.
    grid : Grid
        The ranks.

    Raises
    ------
    LayoutError
        If the layout does not fit the number of dims or the grid.
    ShapeError
        If the block is not of the shape that the layout gives this rank.

    Notes
    -----
    Elementwise arithmetic takes scalars and arrays of the same global shape; an array in another layout is
    redistributed to this one's. Partial sums allow linear operations only.

    Examples
    --------
    >>> A = DistArray(block, (4096, 1024), Layout("row", "col"), grid)
    """

    __slots__ = ("grid", "layout", "local", "shape")
    __array_ufunc__ = None  # NumPy scalars and arrays leave the arithmetic to the methods below

    def __init__(self, local: Block, shape: Sequence[int], layout: Layout, grid: Grid) -> None:
        # Arithmetic on a 0-d array gives a NumPy scalar, which cannot be written to.
        self.local: Block = np.asarray(local) if isinstance(local, np.generic) else local
        self.shape, self.grid = tuple(shape), grid
        self.layout = layout.on(grid.axes, len(self.shape))
        need = box_shape(self.box)
        if tuple(local.shape) != need:
            raise ShapeError(
                f"DistArray: {self.layout} of {self.shape} on {grid} gives the rank at {dict(grid.coords)} "
                f"a block of {need}, not {tuple(local.shape)}"
            )

    @property
    def box(self) -> Box:
        """The global indices of this rank's block: ``(start, stop)`` of each dim."""
        return self.layout.box(self.shape, self.grid.axes, self.grid.coords)

    @property
    def dtype(self) -> Any:
        """The dtype of the elements."""
        return self.local.dtype

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the global array."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return f"DistArray(shape={self.shape}, dtype={self.dtype}, {self.layout}, {self.grid})"

    def like(self, local: Block) -> DistArray:
        """Return an array of this one's shape and layout with another block.

        Parameters
        ----------
        local : array
            This rank's block of the new array, of any dtype.

        Returns
        -------
        DistArray
            The array, which holds `local` without a copy.
        """
        return DistArray(local, self.shape, self.layout, self.grid)

    def redistribute(self, layout: Layout) -> DistArray:
        """Return the same global array in another layout.

        Parameters
        ----------
        layout : Layout
            The new layout.

        Returns
        -------
        DistArray
            The array in the new layout; the array itself where nothing changes, and a view of its block where a local
            slice is enough.

        Raises
        ------
        LayoutError
            If `layout` does not fit the array or the grid.

        Notes
        -----
        **Communication:** a reduce_scatter over the partial axes that cut the new layout, an allreduce over the other
        partial axes, and an all_to_all or allgather over the axes whose place changes, in which a rank receives the
        words of its new block that it lacks. **Adjoint:** a redistribution of the cotangent to this array's layout, its
        partial axes made replicated.

        Examples
        --------
        >>> A.redistribute(Layout("col", None))
        """
        target = layout.on(self.grid.axes, self.ndim)
        if target == self.layout:
            return self
        # X[self.layout] -> X[target]
        block = redistribute(self.local, self.shape, self.layout, target, self.grid)
        return DistArray(block, self.shape, target, self.grid)

    def reduced(self) -> DistArray:
        """Return the array with its partial sums reduced and its cut unchanged.

        Returns
        -------
        DistArray
            The array without partial axes; the array itself if it has none.

        Notes
        -----
        **Communication:** an allreduce of the block over the partial axes. **Adjoint:** the identity.
        """
        return self.redistribute(self.layout.with_partial())

    def replicated(self) -> DistArray:
        """Return the array replicated on all ranks.

        Returns
        -------
        DistArray
            The array in a layout without axes; the array itself if it is replicated already.

        Notes
        -----
        **Communication:** as in `redistribute`: an allreduce over the partial axes, an allgather over the axes that
        cut the array. **Adjoint:** a redistribution of the cotangent to this array's layout.
        """
        return self.redistribute(Layout(*[None] * self.ndim))

    def gather(self, root: int | None = None) -> np.ndarray | None:
        """Return the global array as a NumPy array on one rank of the grid, or on all.

        Parameters
        ----------
        root : int, optional
            The rank that gets the array; every rank by default.

        Returns
        -------
        numpy.ndarray or None
            The global array, which the caller may write to; None on the ranks that do not get it.

        Raises
        ------
        GridError
            If the grid has no such rank.

        Notes
        -----
        **Communication:** after an allreduce of partial sums, the root alone receives n words less its own block;
        without a root, every rank receives the words of `replicated`. **Adjoint:** a scatter from the root.

        Examples
        --------
        >>> whole = A.gather(root=0)
        """
        if root is None:
            return np.array(backend.to_host(self.replicated().local))
        if not 0 <= root < self.grid.size:
            raise GridError(f"gather(root={root}) on {self.grid}: the root must be from 0 to {self.grid.size - 1}")
        out = np.empty(self.shape if self.grid.rank == root else 0, backend.numpy_dtype(self.dtype))

        def put(box: Box, values: np.ndarray) -> None:
            out[index_of(box)] = values

        failure = self.reduced().gather_pieces(put, root)
        if failure is not None:
            raise failure
        return out if self.grid.rank == root else None

    def gather_pieces(self, put: Callable[[Box, np.ndarray], None], root: int = 0) -> Exception | None:
        """Call ``put(box, values)`` on rank `root` for boxes of global indices that tile the array.

        Use it for arrays that no rank can hold. After `put` has failed, the root still receives the remaining boxes and
        drops them, so that no rank is left waiting. Raise the returned failure inside `comm.agreed`, so that all ranks
        raise it.

        Parameters
        ----------
        put : callable
            Called on the root alone, with a box and a NumPy array of its shape.
        root : int
            A rank of the grid.

        Returns
        -------
        Exception or None
            On the root, the first exception that `put` raised; otherwise None.

        Raises
        ------
        LayoutError
            If the array holds partial sums.

        Notes
        -----
        **Communication:** the root receives every element that it does not hold, once, at most 32 MiB of float64 at a
        time: n less its own block. **Adjoint:** a scatter from the root.
        """
        if self.layout.partial:
            raise LayoutError(f"gather_pieces of {self}: reduce its partial sums first, with .reduced()")
        return gather_to_root(self.local, self.shape, self.layout, self.grid, root, put)

    @property
    def T(self) -> DistArray:  # noqa: N802
        """The array with its dims reversed. **Communication:** none."""
        xp = backend.namespace(self.local)
        block = xp.permute_dims(self.local, tuple(reversed(range(self.ndim))))
        layout = Layout(*reversed(self.layout.dims), partial=self.layout.partial)
        return DistArray(block, self.shape[::-1], layout, self.grid)

    @property
    def mT(self) -> DistArray:  # noqa: N802
        """The array with its last two dims exchanged, as in the array API. **Communication:** none."""
        if self.ndim < 2:
            raise ShapeError(f"mT of shape {self.shape}: it needs 2 dims or more")
        xp = backend.namespace(self.local)
        *rest, row, column = range(self.ndim)
        order = (*rest, column, row)
        layout = Layout(*[self.layout.dims[d] for d in order], partial=self.layout.partial)
        return DistArray(xp.permute_dims(self.local, order), [self.shape[d] for d in order], layout, self.grid)

    @property
    def H(self) -> DistArray:  # noqa: N802
        """The conjugate transpose of the matrices in the last two dims. **Communication:** none."""
        return self.mT.conj()

    def conj(self) -> DistArray:
        """Return the complex conjugate.

        Returns
        -------
        DistArray
            The conjugate; the array itself where it is real.
        """
        if backend.numpy_dtype(self.dtype).kind != "c":
            return self
        return self.like(backend.namespace(self.local).conj(self.local))

    def __getitem__(self, index: object) -> DistArray:
        """Return a part of the array by integers, slices of any step, ``...`` and None, as NumPy does.

        Parameters
        ----------
        index : int, slice, ellipsis, None or tuple of these
            The index. A dim keeps the axes that cut it and its part is balanced over them again. An integer drops its
            dim, and the part is replicated over the axes that cut it.

        Returns
        -------
        DistArray
            The part; a view where nothing moves.

        Raises
        ------
        IndexingError
            If the index is out of range, or is a list, a mask or an array.

        Notes
        -----
        **Communication:** none along dims that are uncut or taken whole. Else one all_to_all over the axes that cut the
        others: a rank receives the elements of its block of the result that were not in its own block. **Adjoint:** the
        cotangent, put into zeros of the whole shape.

        Examples
        --------
        >>> A[10:20, :], A[:, -1], A[::2], A[..., None]
        """
        block, shape, layout = select(self.local, self.shape, self.layout, index, self.grid)
        return DistArray(block, shape, layout, self.grid)

    def astype(self, dtype: DTypeLike) -> DistArray:
        """Return the array in another dtype.

        Parameters
        ----------
        dtype : dtype or str
            The new dtype.

        Returns
        -------
        DistArray
            A copy in that dtype, in the same layout.

        Raises
        ------
        LayoutError
            If partial sums would become integers or bools: each of them would be rounded.
        """
        xp = backend.namespace(self.local)
        if self.layout.partial and backend.numpy_dtype(backend.dtype_of(xp, dtype)).kind in "iub":
            raise LayoutError(f"{self} as {dtype}: not linear in partial sums; redistribute it first")
        return self.like(xp.astype(self.local, backend.dtype_of(xp, dtype)))

    def copy(self) -> DistArray:
        """Return a copy that shares no memory with this array.

        Returns
        -------
        DistArray
            The copy, in the same layout.
        """
        return self.like(backend.namespace(self.local).asarray(self.local, copy=True))

    def sum(self) -> Any:
        """Return the sum of all elements.

        Returns
        -------
        int, float or complex
            The sum, the same bits on every rank; 16-bit floats are summed in float32, integers and bools in 64 bits.

        Notes
        -----
        **Communication:** one allreduce of a single word over the axes that cut the array or hold partial sums.
        **Adjoint:** the cotangent on every element.
        """
        local = backend.namespace(self.local).sum(self.local, dtype=backend.sum_dtype(self.local))
        return _total(self, local, (*self.layout.cut, *self.layout.partial))

    def sum_over(self, dims: Sequence[int]) -> DistArray:
        """Return the sum over some dims, as partial sums over the axes that cut them.

        Parameters
        ----------
        dims : sequence of int
            The dims to sum over, not negative.

        Returns
        -------
        DistArray
            The array without these dims. 16-bit floats are summed in float32, integers and bools in int64 and unsigned
            integers in uint64, which is then its dtype.

        Notes
        -----
        **Communication:** none. **Adjoint:** the cotangent, broadcast along the dims.
        """
        kept = [d for d in range(self.ndim) if d not in dims]
        summed = [axis for d in dims for axis in self.layout.dims[d]]
        layout = Layout(*[self.layout.dims[d] for d in kept], partial=(*self.layout.partial, *summed))
        block = backend.sum_over(self.local, dims)
        return DistArray(block, [self.shape[d] for d in kept], layout, self.grid)

    def norm(self) -> float:
        """Return the Frobenius norm, whose squares are summed in float64.

        Returns
        -------
        float
            The norm, the same bits on every rank; NaN if any element is NaN. It is right to rounding wherever float64
            holds it, even if the squares of the elements overflow or vanish.

        Notes
        -----
        **Communication:** one allreduce of a single word, after the reduction of partial sums; a second one if the sum
        of squares is 0, infinite or near the ends of float64's range.
        """
        whole = self.reduced()
        return root_of_squares(
            lambda factor: _total(whole, squares(whole, factor), whole.layout.cut), scaled=not self.grid.is_meta
        )

    def __matmul__(self, other: DistArray) -> DistArray:
        if _matmul is None or not isinstance(other, DistArray):
            return NotImplemented
        return _matmul(self, other)

    def __neg__(self) -> DistArray:
        return self.like(-self.local)

    def __add__(self, other: DistArray | Number) -> DistArray:
        return _linear(operator.add, self, other)

    def __sub__(self, other: DistArray | Number) -> DistArray:
        return _linear(operator.sub, self, other)

    def __mul__(self, other: DistArray | Number) -> DistArray:
        return _scaled(operator.mul, self, other)

    def __truediv__(self, other: DistArray | Number) -> DistArray:
        return _scaled(operator.truediv, self, other)

    def __pow__(self, exponent: float) -> DistArray:
        if self.layout.partial:
            raise LayoutError(f"power of {self}: not linear in partial sums; redistribute it first")
        return self.like(self.local ** _scalar(operator.pow, self, exponent))

    def __radd__(self, other: DistArray | Number) -> DistArray:
        return _linear(operator.add, self, other)

    def __rsub__(self, other: DistArray | Number) -> DistArray:
        return _linear(operator.add, -self, other)

    def __rmul__(self, other: DistArray | Number) -> DistArray:
        return _scaled(operator.mul, self, other)

    def __rtruediv__(self, other: Number) -> DistArray:
        if self.layout.partial:
            raise LayoutError(f"division by {self}: not linear in partial sums; redistribute it first")
        return self.like(_scalar(operator.truediv, self, other) / self.local)

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError(f"{self} is no NumPy array: use .local, this rank's block, or .gather(), the whole array")


@dataclass(frozen=True)
class _Target:
    """The array that a redistribution makes, and its number among the arrays that are redistributed together."""

    number: int
    shape: tuple[int, ...]
    layout: Layout
    grid: Grid


class PendingRedistribution:
    """Arrays on their way into other layouts."""

    def __init__(
        self, arrays: dict[int, DistArray], routes: list[tuple[list[_Target], comm.Request[list[Block]]]]
    ) -> None:
        self._arrays, self._routes = arrays, routes

    def done(self) -> bool:
        """Return whether all arrays have arrived, without waiting; begin the steps that follow completed messages."""
        return sum(request.done() for _, request in self._routes) == len(self._routes)  # calls `done` of every request

    def wait(self) -> list[DistArray]:
        """Wait for the messages and return the arrays, in the order in which they were given."""
        for targets, request in self._routes:
            for target, block in zip(targets, request.wait(), strict=True):
                self._arrays[target.number] = DistArray(block, target.shape, target.layout, target.grid)
        self._routes = []
        return [self._arrays[i] for i in range(len(self._arrays))]


def start_redistribution(arrays: Sequence[DistArray], layouts: Sequence[Layout]) -> PendingRedistribution:
    """Begin to bring arrays into other layouts, and return while the messages are under way.

    Arrays of one dtype that go over the same axes of one grid share their messages. Sums have the same bits as in
    `DistArray.redistribute`. A sum needs this rank between its two phases: call `PendingRedistribution.done` now and
    then, so that the second phase of an allreduce begins.

    Parameters
    ----------
    arrays : sequence of DistArray
        Arrays on one grid or on several. Nobody may write to them before `PendingRedistribution.wait`. Every rank of a
        grid begins the same redistributions in the same order.
    layouts : sequence of Layout
        The new layout of each array.

    Returns
    -------
    PendingRedistribution
        Its `wait` returns the arrays in the other layouts; an array that has its layout already is returned itself.

    Raises
    ------
    LayoutError
        If a layout does not fit its array or the grid, or there are not as many layouts as arrays.

    Notes
    -----
    **Communication:** the words of `DistArray.redistribute`, all as messages from rank to rank. **Adjoint:** the
    redistributions of the cotangents back.

    Examples
    --------
    >>> pending = start_redistribution([A, B], [Layout(None, None)] * 2)
    >>> C = A @ A  # meanwhile
    >>> A, B = pending.wait()
    """
    if len(arrays) != len(layouts):
        raise LayoutError(
            f"start_redistribution: {len(arrays)} arrays and {len(layouts)} layouts; give each array one layout"
        )
    there, routes = dict[int, DistArray](), dict[object, list[tuple[_Target, Block, Plan]]]()
    for i, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
        layout = layout.on(array.grid.axes, array.ndim)
        if layout == array.layout:
            there[i] = array
            continue
        plan = plan_of(array.shape, array.layout, layout, array.grid)
        target = _Target(i, array.shape, layout, array.grid)
        routes.setdefault((array.grid, plan.route, str(array.dtype)), []).append((target, array.local, plan))
    started = []
    for members in routes.values():
        targets = [target for target, _, _ in members]
        request = start([block for _, block, _ in members], [plan for _, _, plan in members], targets[0].grid)
        started.append((targets, request))
    return PendingRedistribution(there, started)


_LEAST_SQUARES, _MOST_SQUARES = 2.0**-900, 2.0**900
"""The sums of squares to which squares that vanish add nothing that counts, and of which 2^120 do not overflow."""
_SCALE = 2.0**600
"""It brings the square of any float64 beyond these sums into the range of float64."""


def root_of_squares(total: Callable[[float], float], scaled: bool = True) -> float:
    """Return the root of a sum of squares, right to rounding even if the squares overflow or vanish.

    Parameters
    ----------
    total : callable
        ``total(factor)`` returns the sum, over all ranks, of the squares of the elements times `factor`, in float64.
        All ranks get the same sum, so that all take a second one or none does.
    scaled : bool
        Whether to sum again with elements scaled by a power of two if the sum is 0, infinite or near the ends of the
        range. A dry run, which has no values, does not.

    Returns
    -------
    float
        The root; NaN if the sum is NaN.

    References
    ----------
    Anderson: Algorithm 978: safe scaling in the level 1 BLAS, ACM TOMS 44, 2017.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        square = total(1.0)
        if _LEAST_SQUARES <= square <= _MOST_SQUARES or math.isnan(square) or not scaled:
            return math.sqrt(square)
        factor = 1 / _SCALE if square > _MOST_SQUARES else _SCALE
        return math.sqrt(total(factor)) / factor


def squares(array: DistArray, factor: float = 1.0) -> Block:
    """Return the sum of the squares of this rank's elements times a factor, in float64 whatever their dtype."""
    xp, block = backend.namespace(array.local), array.local
    is_complex = backend.numpy_dtype(block.dtype).kind == "c"
    square = None
    for part in (xp.real(block), xp.imag(block)) if is_complex else (block,):
        flat = xp.reshape(xp.astype(part, xp.float64, copy=False), (-1,))
        flat = flat if factor == 1.0 else flat * factor
        square = xp.vecdot(flat, flat) if square is None else square + xp.vecdot(flat, flat)
    return square


def _total(array: DistArray, local: Block, axes: Sequence[str]) -> Any:
    """Return the sum over some axes of one number from each rank, as a Python number."""
    # x {U_axes} -> x: allreduce
    total = comm.allreduce(local, array.grid, axes) if axes else local
    return backend.to_host(total).item()


def _match(a: DistArray, b: DistArray) -> DistArray:
    """Return `b` in the layout of `a`, for an elementwise operation."""
    if a.grid is not b.grid:
        raise LayoutError(f"{a} and {b} lie on different grids: make both on the same Grid object")
    if a.shape != b.shape:
        raise ShapeError(f"elementwise operation on shapes {a.shape} and {b.shape}: they must be equal")
    # B[its layout] -> B[layout of A]
    return b.redistribute(a.layout)


def _linear(op: Callable[[Any, Any], Any], a: DistArray, b: DistArray | Number) -> DistArray:
    """Add or subtract. Partial sums stay partial and refuse a scalar, because each rank would add it."""
    if isinstance(b, DistArray):
        return a.like(op(a.local, _match(a, b).local))
    if a.layout.partial:
        raise LayoutError(f"{op.__name__} of a scalar and {a}: not linear in partial sums; redistribute it first")
    return a.like(op(a.local, _scalar(op, a, b)))


def _scaled(op: Callable[[Any, Any], Any], a: DistArray, b: DistArray | Number) -> DistArray:
    """Multiply or divide. Partial sums may be scaled by a number, not by an array."""
    if not isinstance(b, DistArray):
        block = a.local
        for factor in factors_within(_scalar(op, a, b), backend.numpy_dtype(a.dtype).name):
            block = op(block, factor)
        return a.like(block)
    if a.layout.partial or b.layout.partial:
        raise LayoutError(f"{op.__name__} of {a} and {b}: not linear in partial sums; redistribute them first")
    return a.like(op(a.local, _match(a, b).local))


_EXPONENT = {"float16": 14, "bfloat16": 126, "float32": 126, "complex64": 126}
"""The greatest e for which 2^e and 2^-e are normal numbers, of the dtypes that do not hold every Python number."""


def factors_within(number: complex, dtype: str) -> list[complex]:
    """Return factors within the range of a dtype whose product is the number, as a rule the number alone.

    A gradient in float32 of the norm 1e40 is clipped by a factor of 1e-40, which float32 does not hold: 2^-126 and a
    second factor do it. Multiply or divide by them one after the other. All but the last are powers of two.
    """
    most = _EXPONENT.get(dtype)
    if most is None or not isinstance(number, float) or not math.isfinite(number):
        return [number]
    exponent = math.frexp(number)[1]  # 2^(exponent - 1) <= |number| < 2^exponent
    # three powers span the range of each of these dtypes: beyond, the product is 0 or infinite
    count = min(3, (exponent - 1) // most if exponent > 0 else -exponent // most)
    power = math.ldexp(1.0, most if exponent > 0 else -most)
    rest = number / power**count
    if count == 3:  # within the range: 0 times any finite number is 0
        rest = math.copysign(min(max(abs(rest), 2.0**-most), 2.0**most), rest)
    return [*[power] * count, rest]


def _scalar(op: Callable[[Any, Any], Any], a: DistArray, b: Number) -> complex:
    """Return `b` as a Python number, which takes the dtype of the array; scalars of a library may widen it.

    An array is refused: it would be broadcast against the block, not against the global array.
    """
    if np.ndim(b):
        raise ShapeError(f"{op.__name__} of {a} and an array of shape {np.shape(b)}: make it one too, with from_global")
    return b.item() if hasattr(b, "item") else b


def from_global(
    source: Block | Callable[[tuple[slice, ...]], Block],
    grid: Grid,
    layout: Layout,
    shape: Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
) -> DistArray:
    """Return a distributed array with the values of a global array.

    Parameters
    ----------
    source : array_like or callable
        The global array, the same on every rank. For an array that no rank could hold, a function that takes a tuple of
        slices, this rank's global indices, and returns its block. Both may be PyTorch tensors, which are taken without
        their graph and in their own dtype; a lazy conjugate or negative is computed first.
    grid : Grid
        The ranks.
    layout : Layout
        The layout of the result. With partial axes, the ranks of coordinate 0 hold the values and the others zeros.
    shape : tuple of int, optional
        The global shape, needed with a callable.
    dtype : dtype or str, optional
        The dtype of the result; by default that of `source`.

    Returns
    -------
    DistArray
        The array, which shares no memory with `source`.

    Raises
    ------
    ShapeError
        If a callable comes without a shape, or `shape` is not the shape of `source`.
    LayoutError
        If the layout does not fit the shape or the grid.
    DTypeError
        If NumPy has no dtype for those of a tensor.
    SharingError
        If a tensor is sparse or on a device that is neither ``cpu`` nor ``cuda``.
    MismatchError
        Where calls are checked, if the ranks have other values.

    Notes
    -----
    **Communication:** none. Where calls are checked, the ranks of the grid compare a checksum of the values.

    Examples
    --------
    >>> A = from_global(np.eye(1024), grid, Layout("row", "col"))
    """
    if callable(source):
        if shape is None:
            raise ShapeError("from_global: a callable needs shape=, the global shape")
        shape, block_at = tuple(shape), source
    else:
        source = dlpack.values_of(source)
        whole = source if hasattr(source, "shape") else np.asarray(source)
        if shape is not None and tuple(shape) != tuple(whole.shape):
            raise ShapeError(f"from_global: shape={tuple(shape)} for a source of {tuple(whole.shape)}: leave shape out")
        shape = tuple(whole.shape)
        block_at = whole.__getitem__ if shape else lambda _: whole
    layout = layout.on(grid.axes, len(shape))
    if comm.check.checking():
        values = "from a function" if callable(source) else comm.check.checksum(source)
        comm.check.agree("from_global", grid, tuple(grid.axes), shape=shape, layout=layout, dtype=dtype, values=values)
    block = block_at(index_of(layout.box(shape, grid.axes, grid.coords)))
    if isinstance(block, np.ndarray) and not block.dtype.isnative:
        block = block.astype(block.dtype.newbyteorder("="))
    block = grid.to_block(block, dtype)
    if any(grid.coords[axis] for axis in layout.partial):
        block = backend.zeros_like(block, block.shape)
    return DistArray(block, shape, layout, grid)


def full(shape: Sequence[int], value: float, grid: Grid, layout: Layout, dtype: DTypeLike = "float64") -> DistArray:
    """Return an array filled with one value.

    Parameters
    ----------
    shape : tuple of int
        The global shape.
    value : float
        The value of all elements.
    grid : Grid
        The ranks.
    layout : Layout
        The layout. With partial axes, the ranks of coordinate 0 hold the value and the others zeros.
    dtype : dtype or str
        The dtype of the elements.

    Returns
    -------
    DistArray
        The array.

    Raises
    ------
    LayoutError
        If the layout does not fit the shape or the grid.

    Notes
    -----
    **Communication:** none.
    """
    layout = layout.on(grid.axes, len(shape))
    local_value = 0 if any(grid.coords[axis] for axis in layout.partial) else value
    box = layout.box(shape, grid.axes, grid.coords)
    block = grid.empty(box_shape(box), dtype)
    block[...] = local_value
    return DistArray(block, shape, layout, grid)


def zeros(shape: Sequence[int], grid: Grid, layout: Layout, dtype: DTypeLike = "float64") -> DistArray:
    """Return an array of zeros.

    Parameters
    ----------
    shape : tuple of int
        The global shape.
    grid : Grid
        The ranks.
    layout : Layout
        The layout.
    dtype : dtype or str
        The dtype of the elements.

    Returns
    -------
    DistArray
        The array.

    Raises
    ------
    LayoutError
        If the layout does not fit the shape or the grid.

    Notes
    -----
    **Communication:** none.
    """
    return full(shape, 0, grid, layout, dtype)
