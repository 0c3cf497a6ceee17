"""The algorithm of a distributed product: which matrix stays put, which moves, and the products of tiles on each rank.

`contract` calls `execute`, which chooses one of three ways: `_multiply_blocks` if nothing moves, `_multiply_tiles` if C
stays put, and `_multiply_and_scatter` if panels of C move. They get the tiles of the operands from ``operands``,
multiply them by ``gemm`` and reduce partial sums by ``redistribution``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import GridCache
from colossal_mpi.layout import Box, Layout, box_shape, intersect, slices
from colossal_mpi.linalg.contraction.gemm import Conj, accumulate, empty_product, result_dtype
from colossal_mpi.linalg.contraction.operands import Operand, Panels, Tile, Workspace, open_source, workspaces
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of, map_layout
from colossal_mpi.platform import backend, blas
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution import Reduction, plan_reduce_scatter, reduce, stages

_PLANS = GridCache[Hashable, dict[int, Reduction]](limit=1024)
"""The reduce_scatter of each panel, for each kind of product in panels of the result."""


@dataclass
class LocalProduct:
    """The sum ``alpha op(a) op(b)`` over pairs of tiles, added into a block of the result.

    Every dim is cut independently of the others, so the boxes of the result to which two pairs of tiles contribute are
    equal or disjoint: `beta` counts for the first pair of a box, later pairs are added.
    """

    sub: Subscripts
    alpha: complex
    beta: complex
    conj: Conj
    _written: set[Box] = field(default_factory=set)

    def add(self, left: Sequence[Tile], right: Sequence[Tile], c: Block, origin: Box) -> None:
        """Multiply each tile of `left` with the tiles of `right` that it meets, into `c`, whose box is `origin`."""
        sub = self.sub
        for (box_a, x), (box_b, y) in itertools.product(left, right):
            met = _meet(sub, box_a, box_b)
            if met is None:
                continue
            of_a, of_b, of_c = (tuple(met[letter] for letter in letters) for letters in (sub.a, sub.b, sub.c))
            beta = 1 if of_c in self._written else self.beta
            self._written.add(of_c)
            # C[box of m and n] += A[box of m and k] . B[box of k and n]
            accumulate(sub, _at(x, of_a, box_a), _at(y, of_b, box_b), _at(c, of_c, origin), self.alpha, beta, self.conj)


def _meet(sub: Subscripts, box_a: Box, box_b: Box) -> dict[str, tuple[int, int]] | None:
    """Return the range of each letter over which two tiles are multiplied, None if they do not meet."""
    met = dict(zip(sub.a, box_a, strict=True))
    for letter, (low, high) in zip(sub.b, box_b, strict=True):
        start, stop = met.get(letter, (low, high))
        met[letter] = max(low, start), min(high, stop)
    return met if all(start < stop for start, stop in met.values()) else None


def _at(block: Block, box: Box, origin: Box) -> Block:
    return block[(*slices(box, origin), ...)]  # the ellipsis makes a view of a 0-d block, too


def execute(
    product: LocalProduct,
    arrays: Sequence[DistArray],
    axes: Mapping[str, str],
    shape: tuple[int, ...],
    layout: Layout | None,
    panels: Panels,
    target: DistArray | None,
    beta: complex,
) -> DistArray:
    """Compute a product, in `target` if it has the layout in which the product is computed.

    Operands in place are multiplied at once. Small operands, and those with a short summed range, are redistributed
    whole and then multiplied at once. All others are multiplied tile by tile, panel by panel.

    Returns
    -------
    DistArray
        `target`; or the result as the map leaves it, partial over the k-axes; or, if the result is cut into panels, the
        result reduce-scattered over the k-axes for `layout`.
    """
    sub, grid = product.sub, arrays[0].grid
    computed = map_layout(sub.c, axes, sub.k).on(grid.axes, len(sub.c))
    target = target if target is not None and target.layout == computed and _writable(target, arrays) else None
    if not panels.letter and all(_in_place(x, y, axes) for x, y in zip((sub.a, sub.b), arrays, strict=True)):
        return _multiply_blocks(product, arrays, shape, computed, target, beta)
    operands = [
        _operand(letters, array, axes, panels, side)
        for letters, array, side in zip((sub.a, sub.b), arrays, "ab", strict=True)
    ]
    whole = not panels.letter and _prefers_whole(sub, operands, shape, computed)
    operands = [x.moved() if whole or not (panels.letter or x.large) else x for x in operands]
    if layout is not None and panels.cuts(sub.c):
        wanted = layout.on(grid.axes, len(sub.c))
        if stages(computed, wanted)[0]:
            return _multiply_and_scatter(product, operands, shape, computed, wanted)
    return _multiply_tiles(product, operands, shape, computed, target, beta)


def _in_place(letters: str, array: DistArray, axes: Mapping[str, str]) -> bool:
    return array.layout == map_layout(letters, axes).on(array.grid.axes, array.ndim)


def _writable(target: DistArray, arrays: Sequence[DistArray]) -> bool:
    """Return whether the product may be summed in `target` while the operands are read.

    Each rank decides for itself: no communication depends on the answer, and empty blocks do not overlap others.
    """
    overlap = getattr(backend.namespace(target.local), "may_share_memory", None)  # beyond the array API
    if overlap is None or target.dtype != result_dtype(arrays[0].local):
        return False
    return not any(overlap(target.local, array.local) for array in arrays)


def _operand(letters: str, array: DistArray, axes: Mapping[str, str], panels: Panels, side: str) -> Operand:
    wanted = map_layout(letters, axes).on(array.grid.axes, array.ndim)
    # A[M, K] {U_partial} -> A[M, K]: reduce_scatter, or allreduce where no dim is cut over the partial axes
    array = array.redistribute(stages(array.layout, wanted)[1].with_partial())
    return Operand(letters, array, wanted, panels, side, any(axis not in axes for axis in array.layout.cut))


def _prefers_whole(sub: Subscripts, operands: Sequence[Operand], shape: tuple[int, ...], computed: Layout) -> bool:
    """Return whether the summed range is so short that redistributing the operands whole is quicker than tiles.

    Each further tile reads and writes the result once more. Redistribution copies the operands once instead.
    """
    extra = max(operand.parts(sub.k) for operand in operands) - 1
    result = math.prod(box_shape(computed.box(shape, operands[0].array.grid.axes, operands[0].first)))
    return sum(operand.largest for operand in operands) < 2 * extra * result


def _multiply_blocks(
    product: LocalProduct,
    arrays: Sequence[DistArray],
    shape: tuple[int, ...],
    computed: Layout,
    target: DistArray | None,
    beta: complex,
) -> DistArray:
    """Multiply the blocks of operands that are in place. All three matrices stay put."""
    sub, (a, b), grid = product.sub, (array.local for array in arrays), arrays[0].grid
    if target is not None:
        c = target.local
    else:
        c, beta = empty_product(sub, a, extents_of(sub, a.shape, b.shape), grid), 0
    # A[M_m-axes, K_k-axes] . B[K_k-axes, N_n-axes] -> C[M_m-axes, N_n-axes] {U_k-axes}
    accumulate(sub, a, b, c, product.alpha, beta, product.conj)
    return target if target is not None else DistArray(c, shape, computed, grid)


def _multiply_tiles(
    product: LocalProduct,
    operands: Sequence[Operand],
    shape: tuple[int, ...],
    computed: Layout,
    target: DistArray | None,
    beta: complex,
) -> DistArray:
    """Multiply tile by tile. C stays put; panels of A and B move."""
    sub, grid, panels = product.sub, operands[0].array.grid, operands[0].panels
    box = computed.box(shape, grid.axes, grid.coords)
    if target is not None:
        c, product.beta = target.local, beta
    else:
        c = empty_product(sub, operands[0].array.local, dict(zip(sub.c, box_shape(box), strict=True)), grid)
    _scale_if_empty(product, operands, c)
    # A[M_(m,n-axes), K_k-axes] . B[K_(k,m-axes), N_n-axes] -> C[M_m-axes, N_n-axes] {U_k-axes}
    for j, left, right in _panels_of(operands):
        part = panels.cut(sub.c, box, j, grid, grid.coords)
        product.add(left, right, _at(c, part, box), part)
    return target if target is not None else DistArray(c, shape, computed, grid)


def _multiply_and_scatter(
    product: LocalProduct, operands: Sequence[Operand], shape: tuple[int, ...], computed: Layout, wanted: Layout
) -> DistArray:
    """Multiply tile by tile and reduce-scatter each panel of C as soon as it is summed. One operand stays put.

    A stays put if n is streamed, B if m is; panels of C and of the other operand move. The result is in the layout
    between `computed` and `wanted`: reduce-scattered, but not moved yet.
    """
    sub, grid, panels = product.sub, operands[0].array.grid, operands[0].panels
    scattered, middle, _ = stages(computed, wanted)
    box, own = (layout.box(shape, grid.axes, grid.coords) for layout in (computed, middle))
    first = operands[0].array.local
    result = empty_product(sub, first, dict(zip(sub.c, box_shape(own), strict=True)), grid)
    key = ("panels", sub.c, shape, computed, middle, panels)
    plans = _PLANS.get(grid, key, dict)
    space = workspaces(grid, (*key, type(first), str(first.dtype))).setdefault(0, Workspace())
    for j, left, right in _panels_of(operands):
        part = panels.cut(sub.c, box, j, grid, grid.coords)
        if j not in plans:
            plans[j] = plan_reduce_scatter(shape, computed, middle, scattered, grid, part)
        space.reset()
        c = space.take(box_shape(part), result)
        _scale_if_empty(product, operands, c)
        product.add(left, right, c, part)
        target = _at(result, intersect(own, part), own)
        # panel of C[M, N] {U_k-axes} -> panel of C[M_k-axes, N]: reduce_scatter over the k-axes
        target[...] = reduce(c, plans[j], grid)
    return DistArray(result, shape, middle, grid)


def _panels_of(operands: Sequence[Operand]) -> Iterator[tuple[int, list[Tile], list[Tile]]]:
    """Yield each panel's number and the tiles of both operands, while the next panel is under way."""
    panels = operands[0].panels
    with ExitStack() as stack:
        sources = [open_source(operand, stack, keep=bool(panels.letter)) for operand in operands]
        for j in range(panels.count):
            left, right = (source.tiles(j) for source in sources)
            if j + 1 < panels.count:
                for source in sources:
                    source.post(j + 1)
            yield j, left, right


def _scale_if_empty(product: LocalProduct, operands: Sequence[Operand], c: Block) -> None:
    """Scale `c` by beta if nothing will be added to it, because this rank's range of a summed letter is empty."""
    a = operands[0]
    extents = dict(zip(a.letters, box_shape(a.needed[a.me]), strict=True))
    if any(extents[letter] == 0 for letter in product.sub.k):
        blas.scale(c, product.beta)
