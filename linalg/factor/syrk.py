"""Products of a matrix with its own transpose: one triangle is computed, and one triangle moves.

With X[n,k] cut over axes N along n (p parts n_i) and over axes K along k (q parts), rank i of N computes the lower
triangle of its own block of the product and the blocks (i, i+1), ..., (i, i + p/2), modulo p, for which the panels of
X come one at a time. Of the farthest blocks where p is even, which two ranks share, each sums over half of its k. Then
the blocks are summed over K, the triangle packed, and go mirrored to the ranks that hold the other half of their rows.

Words, summed over the ranks of N and K; P is p or, where the result is cut over K too, pq, and n_r its parts:

* panels: ``k n (p - 1) / 2``, half of the full product's. Where p is even and does not divide n, or k is odd, the
  halves of k differ: ``k n (p/2 - 1)``, and for each part of k ``sum_(i<p/2) n_i floor(k/2) + n_(i+p/2) ceil(k/2)``;
* reduction: ``(q - 1) (n(n+1)/2 + S)`` if the result is cut over K, else twice that; the full product's has n^2. S is
  0 for odd p and ``sum_(i<p/2) n_i n_(i+p/2)``, n^2 / 2p, for even p;
* mirroring: ``(n^2 - sum_r n_r^2) / 2 + S``, q times if the result is not cut over K. Of one triangle, only the blocks
  that were computed on the other side of the diagonal move; none with p = 1.

Flop: ``k n (n + LEAF p) / pq`` on each rank at most, half of the full product's.

References
----------
Al Daas, Ballard, Grigori, Kumar, Rouse: Parallel memory-independent communication bounds for SYRK, SPAA 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, GridError, LayoutError, OptionError, ShapeError
from colossal_mpi.layout import Axes, Layout, bounds, part
from colossal_mpi.linalg.contraction.subscripts import map_layout
from colossal_mpi.linalg.factor.packed import gemm, lower_product, mirror, pack, unpack
from colossal_mpi.linalg.factor.ring import Ring, Span
from colossal_mpi.linalg.norms import tril, triu
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def syrk(
    a: DistArray, axes: Mapping[str, str] | None = None, out: Layout | None = None, triangle: str | None = None
) -> DistArray:
    """Return ``a a^T``, symmetric.

    Parameters
    ----------
    a : DistArray, ``[n, k]``
        In any layout.
    axes : mapping of str to str, optional
        Grid axis to letter, n or k, as `contract` has it; `a` is moved to the map first. By default the work is done
        where `a` lies, redundantly along the axes that replicate it.
    out : Layout, optional
        Of the ``[n, n]`` result. By default its rows are cut as those of `a`, and it is replicated over the other axes.
        A layout that is cut over axes of k is reduce-scattered to rows cut over n's and k's axes, and moved from there
        if it is another.
    triangle : {"lower", "upper"}, optional
        Zeros on the other side of the diagonal, which then does not move.

    Returns
    -------
    DistArray
        Both halves are the same bits.

    Raises
    ------
    ShapeError, LayoutError, GridError, DTypeError, OptionError
        If `a` is no matrix, or map, layout or triangle do not fit.

    Notes
    -----
    **Communication:** half of the full product's on the same map; the module has the words. For a long `a`, cut over k
    alone, one allreduce of n(n+1)/2 words. **Adjoint:** ``da = (dc + dc^T) conj(a)``.
    """
    return _product(_Task("syrk", axes, out, triangle, hermitian=False), a, conj_left=False)


def herk(
    a: DistArray, axes: Mapping[str, str] | None = None, out: Layout | None = None, triangle: str | None = None
) -> DistArray:
    """Return ``a a^H``, Hermitian, with a real diagonal.

    Parameters, result, errors and **Communication** are those of `syrk`. **Adjoint:** ``da = (dc + dc^H) a``.
    """
    return _product(_Task("herk", axes, out, triangle, hermitian=True), a, conj_left=False)


def gram(
    a: DistArray, axes: Mapping[str, str] | None = None, out: Layout | None = None, triangle: str | None = None
) -> DistArray:
    """Return ``a^H a``, Hermitian, with a real diagonal.

    Parameters
    ----------
    a : DistArray, ``[k, n]``
    axes, out, triangle
        As in `syrk`: the letter n is that of the columns here.

    Result, errors and **Communication** are those of `syrk`: for a tall `a`, cut over rows alone, one allreduce of
    n(n+1)/2 words. **Adjoint:** ``da = a (dc + dc^H)``.
    """
    if isinstance(a, DistArray):
        a = a.T
    return _product(_Task("gram", axes, out, triangle, hermitian=True), a, conj_left=True)


@dataclass(frozen=True)
class _Task:
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
    x = x.redistribute(x.layout.with_partial() if task.axes is None else map_layout("nk", task.axes))
    rows, summed = x.layout.dims
    scatter = task.out is not None and bool({*task.out.cut} & {*summed})
    ring = _Half(x.grid, rows, x.shape[0], summed, scatter)
    left, right = (task.conj(x.local), x.local) if conj_left else (x.local, task.conj(x.local))
    blocks = _blocks(ring, left, right, x.local, task, conj_left)
    made = _assembled(ring, _reduced(ring, blocks), task)
    made = made if task.triangle is None else (tril if task.triangle == "lower" else triu)(made)
    return made if task.out is None else made.redistribute(task.out)


@dataclass(frozen=True)
class _Half(Ring):
    """Which blocks of the product each rank of a ring computes, and which rows of it each keeps."""

    summed: Axes
    scatter: bool

    @property
    def cut(self) -> Axes:
        """The axes that cut the rows of the result, outer to inner."""
        return (*self.rows, *self.summed) if self.scatter else self.rows

    def own(self, coords: Mapping[str, int]) -> Span:
        """Return the rows of the result that the rank at `coords` holds in the end."""
        return bounds(self.n, self.cut, self.grid.axes, coords)

    def computed(self, block: int) -> list[int]:
        """Return the blocks of columns that rank `block` computes beside its own, nearest first."""
        return [(block + distance) % self.size for distance in range(1, self.size // 2 + 1)]

    def share(self, block: int, other: int, k: int) -> Span:
        """Return the part of k over which rank `block` sums block (block, other): half where `other` has it, too."""
        if 2 * ((other - block) % self.size) != self.size:
            return 0, k
        return part(k, 2, int(block > other))

    def parts(self) -> list[Span]:
        """Return the rows of this rank's block that each rank of the reduction keeps."""
        if not self.scatter:
            return [self.span(self.me)]
        group = [self.grid.coords_of(r, self.summed) for r in range(self.grid.extent(self.summed))]
        return [self.own({**self.grid.coords, **coords}) for coords in group]


def _blocks(
    ring: _Half, left: Block, right: Block, stored: Block, task: _Task, conj_left: bool
) -> tuple[Block, list[Block]]:
    """Return this rank's own triangle of the product and its blocks beside it, each a sum over its own k."""
    others = []
    for other in ring.computed(ring.me):
        to, k = (2 * ring.me - other) % ring.size, stored.shape[1]
        low, high = ring.share(ring.me, other, k)
        panel = ring.fetch(stored, other, (low, high), ring.share(to, ring.me, k))
        others.append(gemm(left[:, low:high], (panel if conj_left else task.conj(panel)).T))
    return lower_product(left, right), others


def _reduced(ring: _Half, blocks: tuple[Block, list[Block]]) -> Block:
    """Return this rank's rows of its blocks, all packed, summed over the axes that cut k."""
    (own, others), (start, _) = blocks, ring.span(ring.me)
    packed: list[Block] = []
    counts: list[int] = []
    for low, high in ring.parts():
        a, b = low - start, high - start
        packed += _flat([own[a:b, :a], *(block[a:b, :] for block in others)], pack(own[a:b, a:b]))
        counts.append(sum(piece.shape[0] for piece in packed) - sum(counts))
    flat = backend.namespace(own).concat(packed)
    if not ring.summed:
        return flat
    if ring.scatter:
        return comm.reduce_scatter(flat, ring.grid, ring.summed, counts)
    return comm.allreduce(flat, ring.grid, ring.summed)


def _flat(blocks: list[Block], first: Block) -> list[Block]:
    xp = backend.namespace(first)
    return [first, *(xp.reshape(block, (-1,)) for block in blocks)]


def _assembled(ring: _Half, flat: Block, task: _Task) -> DistArray:
    """Unpack this rank's rows, exchange the blocks that mirror others', and return the product cut by rows."""
    xp, (low, high) = backend.namespace(flat), ring.own(ring.grid.coords)
    height, start = high - low, ring.span(ring.me)[0]
    out, at = backend.zeros_like(flat, (height, ring.n)), height * (height + 1) // 2
    out[:, low:high] = mirror(unpack(flat[:at], height), task.hermitian)
    for a, b in [(start, low), *map(ring.span, ring.computed(ring.me))]:
        out[:, a:b] = xp.reshape(flat[at : at + height * (b - a)], (height, b - a))
        at += height * (b - a)
    if ring.cut:
        _mirrored(ring, out, task)
    return DistArray(out, (ring.n, ring.n), Layout(ring.cut, None), ring.grid)


def _mirrored(ring: _Half, out: Block, task: _Task) -> None:
    """Add the transposes of the blocks that other ranks hold to this rank's rows, in place."""
    xp, grid = backend.namespace(out), ring.grid
    group = [{**grid.coords, **grid.coords_of(r, ring.cut)} for r in range(grid.extent(ring.cut))]
    spans, (low, high) = [ring.own(coords) for coords in group], ring.own(grid.coords)
    sent = [_wanted(ring, grid.coords, to, task) for to in group]
    pieces = [xp.reshape(out[:, a : b if goes else a], (-1,)) for (a, b), goes in zip(spans, sent, strict=True)]
    counts = [(high - low) * (b - a) * goes for (a, b), goes in zip(spans, sent, strict=True)]
    comes = [_wanted(ring, source, grid.coords, task) for source in group]
    expected = [(b - a) * (high - low) * here for (a, b), here in zip(spans, comes, strict=True)]
    flat, at = comm.all_to_all(xp.concat(pieces), grid, ring.cut, counts, expected), 0
    for (a, b), count in zip(spans, expected, strict=True):
        if count:
            out[:, a:b] += task.conj(xp.reshape(flat[at : at + count], (b - a, high - low)).T)
        at += count


def _wanted(ring: _Half, source: Mapping[str, int], target: Mapping[str, int], task: _Task) -> bool:
    """Say whether the rank at `source` holds a block whose transpose the rank at `target` lacks."""
    have, want = ring.own(source), ring.own(target)
    if have == want or (task.triangle == "lower" and want < have) or (task.triangle == "upper" and have < want):
        return False
    i, j = ring.block_of(source), ring.block_of(target)
    return want < have if i == j else j in ring.computed(i)
