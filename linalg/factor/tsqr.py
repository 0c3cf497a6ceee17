"""TSQR: the QR factorization of a matrix cut by rows, by a binary tree over the ranks. The rows stay put.

`qr` calls it; it moves triangles by ``comm``. Each rank factors its own rows. At every level of the tree a rank with a
partner stacks the partner's R under its own and factors both. Then the orthogonal factors are multiplied down the tree:
the root starts with the signs that make the diagonal of R positive, and every rank ends with its rows of Q. Blocks may
have fewer rows than columns, or none.

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
from colossal_mpi.linalg.factor.triangular import gemm, lower, pack, unpack
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


@dataclass(frozen=True)
class _Level:
    """One level of the tree: rank r, a multiple of ``2 step``, has rank ``r + step`` for its partner."""

    step: int
    heights: list[int]
    """Number of rows of the R of each rank below this level."""

    def partner(self, rank: int) -> int | None:
        """Return the rank that sends its R to `rank` on the way up, None if there is none."""
        other = rank + self.step
        return other if rank % (2 * self.step) == 0 and other < len(self.heights) else None

    def parent(self, rank: int) -> int | None:
        """Return the rank to which `rank` sends its R on the way up, None if there is none."""
        return rank - self.step if rank % (2 * self.step) == self.step else None


@dataclass(frozen=True)
class _Tree:
    """The tree over the ranks that cut the rows, and the number n of columns."""

    grid: Grid
    axes: Axes
    n: int
    levels: list[_Level]

    @property
    def me(self) -> int:
        return rank_of(self.grid.coords, {axis: self.grid.axes[axis] for axis in self.grid.ordered(self.axes)})

    def exchange(self, flat: Block, to: int | None, source: int | None, size: int) -> Block:
        """Send a vector to one rank of the tree and return the vector of `size` elements that another sends."""
        counts, expected = ([0] * self.grid.extent(self.axes) for _ in range(2))
        if to is not None:
            counts[to] = flat.shape[0]
        if source is not None:
            expected[source] = size
        # flat on this rank -> rank `to`; the vector of rank `source` -> this rank
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

    The diagonal of R is real and not negative. `qr` documents the words.
    """
    tree = _tree(a)
    leaf, r = _factors(a.local)
    nodes: list[Block | None] = []
    for level in tree.levels:
        r, node = _up(tree, level, r)
        nodes.append(node)
    r, factor = _signed(r) if tree.me == 0 else (backend.zeros_like(r, (tree.n, tree.n)), r[:0, :])
    for level, node in zip(reversed(tree.levels), reversed(nodes), strict=True):
        factor = _down(tree, level, node, factor)
    # Q[M_rows, N] = leaf[M_rows, h] . factor[h, N] on each rank
    return a.like(gemm(leaf, factor)), _replicated(tree, r)


def _factors(block: Block) -> tuple[Block, Block]:
    """Return Q and R of a block; an empty block, which LAPACK refuses, is its own R."""
    if 0 in block.shape:
        return backend.zeros_like(block, (block.shape[0], 0)), block[:0, :]
    q, r = backend.namespace(block).linalg.qr(block, mode="reduced")
    return q, r


def _up(tree: _Tree, level: _Level, r: Block) -> tuple[Block, Block | None]:
    """Return this rank's R above a level, and the orthogonal factor of the stack if it has a partner there."""
    parent, partner = level.parent(tree.me), level.partner(tree.me)
    height = 0 if partner is None else level.heights[partner]
    size = height * tree.n - height * (height - 1) // 2
    # R[h, N] of the partner -> this rank: a message up the tree
    received = tree.exchange(_trapezoid(r), parent, partner, size)
    if partner is None:
        return r, None
    node, r = _factors(backend.namespace(r).concat([r, _untrapezoid(received, height, tree.n)]))
    return r, node


def _down(tree: _Tree, level: _Level, node: Block | None, factor: Block) -> Block:
    """Return the factor that multiplies this rank's Q below a level, and send the partner its rows of it."""
    xp, parent, partner = backend.namespace(factor), level.parent(tree.me), level.partner(tree.me)
    height = level.heights[tree.me]
    # node[h + h', g] . factor[g, N] -> factor[h + h', N], of which the lower h' rows go to the partner
    whole = factor if node is None else gemm(node, factor)
    below = whole[:0, :] if node is None else whole[height:, :]
    received = tree.exchange(xp.reshape(below, (-1,)), partner, parent, height * tree.n)
    if parent is not None:
        return xp.reshape(received, (height, tree.n))
    return whole if node is None else whole[:height, :]


def _trapezoid(r: Block) -> Block:
    """Return the elements of an upper trapezoid ``[h, n]``, h <= n, that may differ from zero, as a vector."""
    xp, h = backend.namespace(r), r.shape[0]
    return xp.concat([pack(r[:, :h].T), xp.reshape(r[:, h:], (-1,))])


def _untrapezoid(flat: Block, h: int, n: int) -> Block:
    xp, triangle = backend.namespace(flat), h * (h + 1) // 2
    square = lower(unpack(flat[:triangle], h)).T
    return xp.concat([square, xp.reshape(flat[triangle:], (h, n - h))], axis=1)


def _signed(r: Block) -> tuple[Block, Block]:
    """Return R with a diagonal that is real and not negative, and the diagonal matrix that multiplies Q."""
    xp = backend.namespace(r)
    diagonal = xp.linalg.diagonal(r)
    size = xp.abs(diagonal)
    known, one = size > 0, xp.ones_like(size)
    phase = xp.where(known, diagonal, xp.ones_like(diagonal)) / xp.astype(xp.where(known, size, one), r.dtype)
    conj = xp.conj(phase) if backend.numpy_dtype(r.dtype).kind == "c" else phase
    on_diagonal = xp.arange(r.shape[0])[:, None] == xp.arange(r.shape[0])[None, :]
    # Dividing a number by its own phase leaves an imaginary rounding error: the size is exact.
    positive = xp.where(on_diagonal, xp.astype(size, r.dtype)[:, None], r * conj[:, None])
    return positive, xp.where(on_diagonal, phase[:, None], xp.zeros_like(r))


def _replicated(tree: _Tree, r: Block) -> Block:
    """Return the root's R on all ranks of the tree."""
    if not tree.levels:
        return r
    # R[N, N] of the root -> every rank: bcast of the packed triangle
    flat = comm.bcast(pack(r.T), tree.grid, tree.axes)
    return lower(unpack(flat, tree.n)).T
