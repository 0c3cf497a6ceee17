"""Products of a matrix with its own transpose: half of the work and half of the words of the full product.

``linalg`` exports `syrk`, `herk` and `gram`; QR and the polar factor call them. They multiply blocks by ``triangular``
and move panels, partial sums and mirrored blocks by ``comm``. X stays put, its panels go around a ring.

With X[n, k] cut over axes N along n (p parts n_i) and over axes K along k (q parts), rank i of N computes the lower
triangle of its own diagonal block of the product and the blocks (i, i+1), ..., (i, i + p/2), modulo p, for which it
fetches one panel of X at a time. If p is even, two ranks share the farthest block, and each sums over half of its k.
Then the packed blocks are summed over K, and their transposes are sent to the ranks that store the other half of the
rows::

    # X[N_row, K_col] . X^T[K_col, N] -> half of C[N_row, N] {U_col} -> half of C[N_row, N] -> C[N_row, N]

Words received, summed over the ranks of N and K. P is p, or pq where the result is cut over K too, and n_r are its
parts:

* panels: ``k n (p - 1) / 2``, half of the words of the full product. Where p is even and does not divide n, or k is
  odd, the halves of k differ: ``k n (p/2 - 1)``, and for each part of k
  ``sum_(i<p/2) n_i floor(k/2) + n_(i+p/2) ceil(k/2)``;
* reduction: ``(q - 1) (n(n+1)/2 + S)`` if the result is cut over K, else twice that; the full product has n^2 in place
  of the second factor. S is 0 for odd p and ``sum_(i<p/2) n_i n_(i+p/2)``, n^2 / 2p, for even p;
* mirroring: ``(n^2 - sum_r n_r^2) / 2 + S``, times q if the result is not cut over K. If one triangle is wanted, only
  the blocks that were computed on the other side of the diagonal move; none with p = 1.

Each rank computes at most ``k n (n + LEAF p) / pq`` flop, half of the full product.

References
----------
Al Daas, Ballard, Grigori, Kumar, Rouse: Parallel memory-independent communication bounds for SYRK, SPAA 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, LayoutError, OptionError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, Layout, bounds, coords_of, part, rank_of
from colossal_mpi.linalg.contraction.subscripts import map_layout
from colossal_mpi.linalg.factor.triangular import gemm, lower_product, mirror, pack, unpack
from colossal_mpi.linalg.norms import tril, triu
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Range = tuple[int, int]
"""A range of indices: start and stop."""


def syrk(
    a: DistArray, axes: Mapping[str, str] | None = None, out: Layout | None = None, triangle: str | None = None
) -> DistArray:
    """Return ``a a^T``, a symmetric matrix.

    Parameters
    ----------
    a : DistArray, ``[n, k]``
        The matrix in any layout.
    axes : mapping of str to str, optional
        Grid axis to letter, n or k, as in `contract`; `a` is moved to the map first. By default the product is
        computed where `a` is stored, by all ranks along axes that replicate it.
    out : Layout, optional
        The layout of the result. By default its rows are cut as n is, and it is replicated over the other axes. A
        layout that is cut over axes of k is reduce-scattered to rows that are cut over n's and k's axes, and moved from
        there if it is another layout.
    triangle : {"lower", "upper"}, optional
        The triangle that is wanted: the other one is set to zero and does not move.

    Returns
    -------
    DistArray, ``[n, n]``
        The product; the two triangles have the same bits. Integers and bools are multiplied and summed in 64 bits, and
        the product has that dtype.

    Raises
    ------
    ShapeError, OptionError
        If `a` is no matrix, or there is no such triangle.
    LayoutError, GridError
        If the map or the layout does not fit.
    DTypeError
        If `a` is no DistArray.

    Notes
    -----
    **Communication:** an all_to_all for each panel over the axes of n, an allreduce or reduce_scatter over the axes of
    k, and an all_to_all that mirrors the blocks: half of the words of the full product on the same map, see
    ``linalg.factor.syrk`` for the formulas. If `a` is cut over k alone: one allreduce of
    n(n+1)/2 words.

    **Adjoint:** ``da = (dc + dc^T) conj(a)``.
    """
    return _product(_Task("syrk", axes, out, triangle, hermitian=False), a, conj_left=False)


def herk(
    a: DistArray, axes: Mapping[str, str] | None = None, out: Layout | None = None, triangle: str | None = None
) -> DistArray:
    """Return ``a a^H``, a Hermitian matrix with a real diagonal.

    Parameters
    ----------
    a : DistArray, ``[n, k]``
        The matrix in any layout.
    axes : mapping of str to str, optional
        Grid axis to letter, n or k, as in `contract`; `a` is moved to the map first. By default the product is
        computed where `a` is stored, by all ranks along axes that replicate it.
    out : Layout, optional
        The layout of the result. By default its rows are cut as n is, and it is replicated over the other axes. A
        layout that is cut over axes of k is reduce-scattered to rows that are cut over n's and k's axes, and moved from
        there if it is another layout.
    triangle : {"lower", "upper"}, optional
        The triangle that is wanted: the other one is set to zero and does not move.

    Returns
    -------
    DistArray, ``[n, n]``
        The product; the two triangles have the same bits. Integers and bools are multiplied and summed in 64 bits, and
        the product has that dtype.

    Raises
    ------
    ShapeError, OptionError
        If `a` is no matrix, or there is no such triangle.
    LayoutError, GridError
        If the map or the layout does not fit.
    DTypeError
        If `a` is no DistArray.

    Notes
    -----
    **Communication:** an all_to_all for each panel over the axes of n, an allreduce or reduce_scatter over the axes of
    k, and an all_to_all that mirrors the blocks: half of the words of the full product on the same map, see
    ``linalg.factor.syrk`` for the formulas. If `a` is cut over k alone: one allreduce of
    n(n+1)/2 words.

    **Adjoint:** ``da = (dc + dc^H) a``.
    """
    return _product(_Task("herk", axes, out, triangle, hermitian=True), a, conj_left=False)


def gram(
    a: DistArray, axes: Mapping[str, str] | None = None, out: Layout | None = None, triangle: str | None = None
) -> DistArray:
    """Return ``a^H a``, the Gram matrix of the columns: Hermitian, with a real diagonal.

    Parameters
    ----------
    a : DistArray, ``[k, n]``
        The matrix in any layout.
    axes : mapping of str to str, optional
        Grid axis to letter, n or k, as in `contract`; `a` is moved to the map first. The letter n belongs to the
        columns here. By default the product is computed where `a` is stored, by all ranks along axes that replicate it.
    out : Layout, optional
        The layout of the result. By default its rows are cut as n is, and it is replicated over the other axes. A
        layout that is cut over axes of k is reduce-scattered to rows that are cut over n's and k's axes, and moved from
        there if it is another layout.
    triangle : {"lower", "upper"}, optional
        The triangle that is wanted: the other one is set to zero and does not move.

    Returns
    -------
    DistArray, ``[n, n]``
        The product; the two triangles have the same bits. Integers and bools are multiplied and summed in 64 bits, and
        the product has that dtype.

    Raises
    ------
    ShapeError, OptionError
        If `a` is no matrix, or there is no such triangle.
    LayoutError, GridError
        If the map or the layout does not fit.
    DTypeError
        If `a` is no DistArray.

    Notes
    -----
    **Communication:** an all_to_all for each panel over the axes of n, an allreduce or reduce_scatter over the axes of
    k, and an all_to_all that mirrors the blocks: half of the words of the full product on the same map, see
    ``linalg.factor.syrk`` for the formulas. If a tall `a` is cut over its rows alone: one
    allreduce of n(n+1)/2 words.

    **Adjoint:** ``da = a (dc + dc^H)``.

    Examples
    --------
    >>> g = gram(from_global(np.ones((9, 2)), grid, Layout("row", None)))
    """
    if isinstance(a, DistArray):
        a = a.T
    return _product(_Task("gram", axes, out, triangle, hermitian=True), a, conj_left=True)


@dataclass(frozen=True)
class _Task:
    """The arguments of a call, and the function that was called."""

    name: str
    axes: Mapping[str, str] | None
    out: Layout | None
    triangle: str | None
    hermitian: bool

    def check(self, x: DistArray) -> None:
        if not isinstance(x, DistArray):
            raise DTypeError(f"{self.name} of {type(x).__name__}: make a DistArray of it")
        if x.ndim != 2:
            raise ShapeError(f"{self.name} of shape {x.shape}: it must be a matrix, of 2 dims")
        if self.triangle not in (None, "lower", "upper"):
            raise OptionError(f"{self.name}: triangle={self.triangle!r}; use 'lower', 'upper' or None for both")
        for axis, letter in (self.axes or {}).items():
            if axis not in x.grid.axes:
                raise GridError(f"{self.name}: no axis {axis!r} on {x.grid}")
            if letter not in ("n", "k"):
                raise LayoutError(f"{self.name}: axis {axis!r} is mapped to {letter!r}; use 'n' or 'k', the summed dim")
        if self.out is not None:
            self.out.on(x.grid.axes, 2)

    def conj(self, block: Block) -> Block:
        xp = backend.namespace(block)
        return xp.conj(block) if self.hermitian and backend.numpy_dtype(block.dtype).kind == "c" else block


def _product(task: _Task, x: DistArray, conj_left: bool) -> DistArray:
    """Return X X^T, X X^H or, with `conj_left`, conj(X) X^T of an ``[n, k]`` array."""
    task.check(x)
    if backend.numpy_dtype(x.dtype).kind in "biu":
        # X[N, K] {U_partial} -> X[N, K]: integers are added in their own dtype, and only then get 64 bits
        x = x.reduced()
        x = x.like(backend.summable(x.local))
    # X[its layout] -> X[N_rows, K_summed]
    x = x.redistribute(x.layout.with_partial() if task.axes is None else map_layout("nk", task.axes))
    rows, summed = x.layout.dims
    scatter = task.out is not None and bool({*task.out.cut} & {*summed})
    ring = _Ring(x.grid, rows, x.shape[0], summed, scatter)
    left, right = (task.conj(x.local), x.local) if conj_left else (x.local, task.conj(x.local))
    blocks = _blocks(ring, left, right, x.local, task, conj_left)
    c = _assembled(ring, _reduced(ring, blocks), task)
    c = c if task.triangle is None else (tril if task.triangle == "lower" else triu)(c)
    # C[N_rows, N] -> C[out]
    return c if task.out is None else c.redistribute(task.out)


@dataclass(frozen=True)
class _Ring:
    """The ranks that cut the rows of X, in the order of the rows, and the blocks of the product that each computes.

    `rows` are the axes that cut the n rows of X, `summed` the axes that cut its columns; `scatter` says whether the
    result is reduce-scattered over `summed`.
    """

    grid: Grid
    rows: Axes
    n: int
    summed: Axes
    scatter: bool

    @property
    def size(self) -> int:
        """The number of blocks of rows."""
        return self.grid.extent(self.rows)

    @property
    def me(self) -> int:
        """The number of this rank's block of rows."""
        return self.block_of(self.grid.coords)

    def block_of(self, coords: Mapping[str, int]) -> int:
        """Return the number of the block of rows that the rank at `coords` stores."""
        return rank_of(coords, {axis: self.grid.axes[axis] for axis in self.rows})

    def _coords(self, block: int) -> dict[str, int]:
        return coords_of(block, {axis: self.grid.axes[axis] for axis in self.rows})

    def rows_of(self, block: int) -> Range:
        """Return the rows of a block."""
        return bounds(self.n, self.rows, self.grid.axes, self._coords(block))

    def _rank(self, block: int) -> int:
        """Return the rank in the communicator of the ring that stores a block."""
        return rank_of(self._coords(block), {axis: self.grid.axes[axis] for axis in self.grid.ordered(self.rows)})

    def fetch(self, stored: Block, other: int, theirs: Range, own: Range) -> Block:
        """Return columns `theirs` of the rows of block `other`, and send columns `own` of this rank's rows.

        The receiver is the rank at the same distance on the other side of the ring. All ranks of the ring call it with
        the same distance.
        """
        xp, to = backend.namespace(stored), (2 * self.me - other) % self.size
        (low, high), (first, last) = theirs, own
        start, stop = self.rows_of(other)
        shape = (stop - start, high - low)
        counts, expected = [0] * self.size, [0] * self.size
        counts[self._rank(to)], expected[self._rank(other)] = stored.shape[0] * (last - first), math.prod(shape)
        send = xp.reshape(stored[:, first:last], (-1,))
        # block i of X[N_rows, K] -> block i - distance: a shift around the ring
        return xp.reshape(comm.all_to_all(send, self.grid, self.rows, counts, expected), shape)

    @property
    def cut(self) -> Axes:
        """The axes that cut the rows of the result, outer to inner."""
        return (*self.rows, *self.summed) if self.scatter else self.rows

    def result_rows(self, coords: Mapping[str, int]) -> Range:
        """Return the rows of the result that the rank at `coords` stores in the end."""
        return bounds(self.n, self.cut, self.grid.axes, coords)

    def computed(self, block: int) -> list[int]:
        """Return the column blocks that rank `block` computes besides its diagonal block, nearest first."""
        return [(block + distance) % self.size for distance in range(1, self.size // 2 + 1)]

    def share(self, block: int, other: int, k: int) -> Range:
        """Return the part of k over which rank `block` sums block (block, other): half if both compute it."""
        if 2 * ((other - block) % self.size) != self.size:
            return 0, k
        return part(k, 2, int(block > other))

    def parts(self) -> list[Range]:
        """Return the rows of this rank's block that each rank of the reduction stores in the end."""
        if not self.scatter:
            return [self.rows_of(self.me)]
        group = [self.grid.coords_of(r, self.summed) for r in range(self.grid.extent(self.summed))]
        return [self.result_rows({**self.grid.coords, **coords}) for coords in group]


def _blocks(
    ring: _Ring, left: Block, right: Block, stored: Block, task: _Task, conj_left: bool
) -> tuple[Block, list[Block]]:
    """Return the triangle of this rank's diagonal block and its further blocks, partial sums over the rank's own k."""
    others = []
    for other in ring.computed(ring.me):
        to, k = (2 * ring.me - other) % ring.size, stored.shape[1]
        low, high = ring.share(ring.me, other, k)
        # X[N_i, K] . X^T[K, N_j] -> C[N_i, N_j] {U_summed}
        panel = ring.fetch(stored, other, (low, high), ring.share(to, ring.me, k))
        others.append(gemm(left[:, low:high], (panel if conj_left else task.conj(panel)).T))
    # X[N_i, K] . X^T[K, N_i] -> lower triangle of C[N_i, N_i] {U_summed}
    return lower_product(left, right), others


def _reduced(ring: _Ring, blocks: tuple[Block, list[Block]]) -> Block:
    """Return this rank's rows of its blocks, packed and summed over the axes that cut k."""
    (own, others), (start, _) = blocks, ring.rows_of(ring.me)
    xp = backend.namespace(own)
    packed: list[Block] = []
    counts: list[int] = []
    for low, high in ring.parts():
        a, b = low - start, high - start
        packed.append(pack(own[a:b, a:b]))
        packed += [xp.reshape(block, (-1,)) for block in [own[a:b, :a], *(other[a:b, :] for other in others)]]
        counts.append(sum(x.shape[0] for x in packed) - sum(counts))
    flat = xp.concat(packed)
    if not ring.summed:
        return flat
    # half of C[N_rows, N] {U_summed} -> half of C[N_(rows,summed), N] or half of C[N_rows, N]
    if ring.scatter:
        return comm.reduce_scatter(flat, ring.grid, ring.summed, counts)
    return comm.allreduce(flat, ring.grid, ring.summed)


def _assembled(ring: _Ring, flat: Block, task: _Task) -> DistArray:
    """Unpack this rank's rows, add the mirrored blocks of other ranks, and return the product, cut by rows."""
    xp, (low, high) = backend.namespace(flat), ring.result_rows(ring.grid.coords)
    height, start = high - low, ring.rows_of(ring.me)[0]
    out, at = backend.zeros_like(flat, (height, ring.n)), height * (height + 1) // 2
    out[:, low:high] = mirror(unpack(flat[:at], height), task.hermitian)
    for a, b in [(start, low), *map(ring.rows_of, ring.computed(ring.me))]:
        out[:, a:b] = xp.reshape(flat[at : at + height * (b - a)], (height, b - a))
        at += height * (b - a)
    if ring.cut:
        _add_mirrored(ring, out, task)
    return DistArray(out, (ring.n, ring.n), Layout(ring.cut, None), ring.grid)


def _add_mirrored(ring: _Ring, out: Block, task: _Task) -> None:
    """Add the transposes of the blocks that other ranks computed to this rank's rows, in place."""
    xp, grid = backend.namespace(out), ring.grid
    group = [{**grid.coords, **grid.coords_of(r, ring.cut)} for r in range(grid.extent(ring.cut))]
    spans, (low, high) = [ring.result_rows(coords) for coords in group], ring.result_rows(grid.coords)
    sent = [_needs_transpose(ring, grid.coords, to, task) for to in group]
    blocks = [xp.reshape(out[:, a : b if goes else a], (-1,)) for (a, b), goes in zip(spans, sent, strict=True)]
    counts = [(high - low) * (b - a) * goes for (a, b), goes in zip(spans, sent, strict=True)]
    comes = [_needs_transpose(ring, source, grid.coords, task) for source in group]
    expected = [(b - a) * (high - low) * here for (a, b), here in zip(spans, comes, strict=True)]
    # C[N_i, N_j] -> C^T[N_j, N_i] on the rank that stores rows j: all_to_all
    flat, at = comm.all_to_all(xp.concat(blocks), grid, ring.cut, counts, expected), 0
    for (a, b), count in zip(spans, expected, strict=True):
        if count:
            out[:, a:b] += task.conj(xp.reshape(flat[at : at + count], (b - a, high - low)).T)
        at += count


def _needs_transpose(ring: _Ring, source: Mapping[str, int], target: Mapping[str, int], task: _Task) -> bool:
    """Return whether the rank at `source` computed a block whose transpose the rank at `target` needs."""
    have, want = ring.result_rows(source), ring.result_rows(target)
    if have == want or (task.triangle == "lower" and want < have) or (task.triangle == "upper" and have < want):
        return False
    i, j = ring.block_of(source), ring.block_of(target)
    return want < have if i == j else j in ring.computed(i)
