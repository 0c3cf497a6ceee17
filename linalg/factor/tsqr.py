"""TSQR: the QR factorization of a matrix cut by rows, by a binary tree over the ranks.

Each rank factors its own rows. At every level of the tree a rank with a partner stacks the partner's R under its own
and factors both. Then the orthogonal factors are multiplied down the tree: the root starts with the signs that make the
diagonal of R positive, and every rank ends with its rows of Q. Blocks may have fewer rows than columns, or none.

References
----------
Demmel, Grigori, Hoemmen, Langou: Communication-optimal parallel and sequential QR and LU factorizations, SISC 2012.
"""

from __future__ import annotations

from dataclasses import dataclass

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, bounds, rank_of
from colossal_mpi.linalg.factor.packed import gemm, lower, pack, unpack
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


@dataclass(frozen=True)
class _Level:
    """One level of the tree: rank r, a multiple of ``2 step``, has rank ``r + step`` for its partner."""

    step: int
    heights: list[int]
    """Rows of the R that each rank holds below this level."""

    def partner(self, rank: int) -> int | None:
        """Return who sends to `rank` on the way up."""
        other = rank + self.step
        return other if rank % (2 * self.step) == 0 and other < len(self.heights) else None

    def parent(self, rank: int) -> int | None:
        """Return to whom `rank` sends on the way up."""
        return rank - self.step if rank % (2 * self.step) == self.step else None


@dataclass(frozen=True)
class _Tree:
    grid: Grid
    axes: Axes
    n: int
    levels: list[_Level]

    @property
    def me(self) -> int:
        return rank_of(self.grid.coords, {axis: self.grid.axes[axis] for axis in self.grid.ordered(self.axes)})

    def pass_on(self, flat: Block, to: int | None, source: int | None, size: int) -> Block:
        """Send a flat block to a rank of the tree and return the one of `size` elements that comes from another."""
        counts, expected = ([0] * self.grid.extent(self.axes) for _ in range(2))
        if to is not None:
            counts[to] = flat.shape[0]
        if source is not None:
            expected[source] = size
        return comm.all_to_all(flat if to is not None else flat[:0], self.grid, self.axes, counts, expected)


def _tree(a: DistArray) -> _Tree:
    (m, n), axes, grid = a.shape, a.layout.dims[0], a.grid
    spans = [bounds(m, axes, grid.axes, grid.coords_of(r, axes)) for r in range(grid.extent(axes))]
    heights, levels, step = [min(stop - start, n) for start, stop in spans], [], 1
    while step < len(heights):
        levels.append(_Level(step, heights))
        stacked = [h + (heights[r + step] if r + step < len(heights) else 0) for r, h in enumerate(heights)]
        heights = [min(h, n) if r % (2 * step) == 0 else 0 for r, h in enumerate(stacked)]
        step *= 2
    return _Tree(grid, axes, n, levels)


def tsqr(a: DistArray) -> tuple[DistArray, Block]:
    """Return Q, in the layout of `a`, and R, replicated, of a tall matrix cut by rows.

    The diagonal of R is real and not negative. Words: see `qr`.
    """
    tree = _tree(a)
    leaf, r = _factors(a.local)
    nodes: list[Block | None] = []
    for level in tree.levels:
        r, node = _up(tree, level, r)
        nodes.append(node)
    r, turn = _signed(r) if tree.me == 0 else (backend.zeros_like(r, (tree.n, tree.n)), r[:0, :])
    for level, node in zip(reversed(tree.levels), reversed(nodes), strict=True):
        turn = _down(tree, level, node, turn)
    return a.like(gemm(leaf, turn)), _replicated(tree, r)


def _factors(block: Block) -> tuple[Block, Block]:
    """Return Q and R of a block; an empty one, which LAPACK refuses, is its own R."""
    if 0 in block.shape:
        return backend.zeros_like(block, (block.shape[0], 0)), block[:0, :]
    q, r = backend.namespace(block).linalg.qr(block, mode="reduced")
    return q, r


def _up(tree: _Tree, level: _Level, r: Block) -> tuple[Block, Block | None]:
    """Return the R of this rank above a level and the orthogonal factor of its stack, if it has a partner there."""
    parent, partner = level.parent(tree.me), level.partner(tree.me)
    height = 0 if partner is None else level.heights[partner]
    size = height * tree.n - height * (height - 1) // 2
    came = tree.pass_on(_trapezoid(r), parent, partner, size)
    if partner is None:
        return r, None
    node, r = _factors(backend.namespace(r).concat([r, _untrapezoid(came, height, tree.n)]))
    return r, node


def _down(tree: _Tree, level: _Level, node: Block | None, turn: Block) -> Block:
    """Return by what this rank's factor below a level is multiplied, once the partner has got its share."""
    xp, parent, partner = backend.namespace(turn), level.parent(tree.me), level.partner(tree.me)
    height = level.heights[tree.me]
    whole = turn if node is None else gemm(node, turn)
    given = whole[:0, :] if node is None else whole[height:, :]
    came = tree.pass_on(xp.reshape(given, (-1,)), partner, parent, height * tree.n)
    if parent is not None:
        return xp.reshape(came, (height, tree.n))
    return whole if node is None else whole[:height, :]


def _trapezoid(r: Block) -> Block:
    """Return what is not zero by construction of an upper trapezoid ``[h, n]``, h <= n, flat."""
    xp, h = backend.namespace(r), r.shape[0]
    return xp.concat([pack(r[:, :h].T), xp.reshape(r[:, h:], (-1,))])


def _untrapezoid(flat: Block, h: int, n: int) -> Block:
    xp, triangle = backend.namespace(flat), h * (h + 1) // 2
    square = lower(unpack(flat[:triangle], h)).T
    return xp.concat([square, xp.reshape(flat[triangle:], (h, n - h))], axis=1)


def _signed(r: Block) -> tuple[Block, Block]:
    """Return R with a diagonal that is real and not negative, and the diagonal matrix that turns Q likewise."""
    xp = backend.namespace(r)
    diagonal = xp.linalg.diagonal(r)
    size = xp.abs(diagonal)
    known, one = size > 0, xp.ones_like(size)
    phase = xp.where(known, diagonal, xp.ones_like(diagonal)) / xp.astype(xp.where(known, size, one), r.dtype)
    conj = xp.conj(phase) if backend.numpy_dtype(r.dtype).kind == "c" else phase
    on_diagonal = xp.arange(r.shape[0])[:, None] == xp.arange(r.shape[0])[None, :]
    # A number over its own phase has an imaginary part of rounding
    straight = xp.where(on_diagonal, xp.astype(size, r.dtype)[:, None], r * conj[:, None])
    return straight, xp.where(on_diagonal, phase[:, None], xp.zeros_like(r))


def _replicated(tree: _Tree, r: Block) -> Block:
    """Return the root's R on all ranks of the tree."""
    if not tree.levels:
        return r
    flat = comm.bcast(pack(r.T), tree.grid, tree.axes)
    return lower(unpack(flat, tree.n)).T
