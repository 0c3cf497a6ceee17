"""Do a product on one rank: bring the pieces of the operands, panel by panel, and multiply those that meet."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import GridCache
from colossal_mpi.layout import Box, Layout, box_shape, intersect, slices
from colossal_mpi.linalg.contraction.gemm import Conj, accumulate, empty_product
from colossal_mpi.linalg.contraction.operands import Operand, Piece, Space, bring, kept
from colossal_mpi.linalg.contraction.subscripts import Subscripts
from colossal_mpi.platform import blas
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution import Reduction, plan_reduce_scatter, reduce, stages

_PLANS = GridCache[Hashable, dict[int, Reduction]](limit=1024)
"""For each kind of product in panels of the result: the reduce_scatter of each panel."""


@dataclass
class Work:
    """``alpha op(a) op(b)`` of pieces, added into blocks of the result.

    Dims are cut independently of one another, so the boxes of the result in which two pairs of pieces meet are equal or
    disjoint: beta counts where a box is met first.
    """

    sub: Subscripts
    alpha: complex
    beta: complex
    conj: Conj
    _seen: set[Box] = field(default_factory=set)

    def add(self, left: Sequence[Piece], right: Sequence[Piece], c: Block, origin: Box) -> None:
        """Multiply each piece of `left` with those of `right` that it meets, into `c`, which lies at `origin`."""
        sub = self.sub
        for (box_a, x), (box_b, y) in itertools.product(left, right):
            met = _meet(sub, box_a, box_b)
            if met is None:
                continue
            of_a, of_b, of_c = (tuple(met[letter] for letter in letters) for letters in (sub.a, sub.b, sub.c))
            beta = 1 if of_c in self._seen else self.beta
            self._seen.add(of_c)
            accumulate(sub, _at(x, of_a, box_a), _at(y, of_b, box_b), _at(c, of_c, origin), self.alpha, beta, self.conj)


def _meet(sub: Subscripts, box_a: Box, box_b: Box) -> dict[str, tuple[int, int]] | None:
    """Return the range of each letter in which two pieces are multiplied, None if they do not meet."""
    met = dict(zip(sub.a, box_a, strict=True))
    for letter, (low, high) in zip(sub.b, box_b, strict=True):
        start, stop = met.get(letter, (low, high))
        met[letter] = max(low, start), min(high, stop)
    return met if all(start < stop for start, stop in met.values()) else None


def _at(block: Block, box: Box, origin: Box) -> Block:
    return block[(*slices(box, origin), ...)]  # the ellipsis makes a view of a 0-d block, too


def execute(work: Work, operands: Sequence[Operand], c: Block, at: Box) -> None:
    """Do the product into `c`, this rank's block of the result, which lies at the box `at`."""
    grid, panels = operands[0].array.grid, operands[0].panels
    _clear(work, operands, c)
    for j, left, right in _brought(operands):
        box = panels.cut(work.sub.c, at, j, grid, grid.coords)
        work.add(left, right, _at(c, box, at), box)


def execute_scattered(
    work: Work, operands: Sequence[Operand], shape: tuple[int, ...], made: Layout, wanted: Layout
) -> DistArray:
    """Do the product in panels of the result, each summed over the axes that cut `wanted` as soon as it is made.

    Returns
    -------
    DistArray
        In the layout between `made` and `wanted`: reduce-scattered, not yet moved.
    """
    sub, grid, panels = work.sub, operands[0].array.grid, operands[0].panels
    scattered, middle, _ = stages(made, wanted)
    at, own = (layout.box(shape, grid.axes, grid.coords) for layout in (made, middle))
    first = operands[0].array.local
    result = empty_product(sub, first, dict(zip(sub.c, box_shape(own), strict=True)), grid)
    key = ("panels", sub.c, shape, made, middle, panels)
    plans = _PLANS.get(grid, key, dict)
    space = kept(grid, (*key, type(first), str(first.dtype))).setdefault(0, Space())
    for j, left, right in _brought(operands):
        box = panels.cut(sub.c, at, j, grid, grid.coords)
        if j not in plans:
            plans[j] = plan_reduce_scatter(shape, made, middle, scattered, grid, box)
        space.reset()
        c = space.take(box_shape(box), result)
        _clear(work, operands, c)
        work.add(left, right, c, box)
        target = _at(result, intersect(own, box), own)
        target[...] = reduce(c, plans[j], grid)
    return DistArray(result, shape, middle, grid)


def _brought(operands: Sequence[Operand]) -> Iterator[tuple[int, list[Piece], list[Piece]]]:
    """Yield each panel with the pieces of the operands, the next panel's under way."""
    panels = operands[0].panels
    with ExitStack() as stack:
        sources = [bring(operand, stack, keep=bool(panels.letter)) for operand in operands]
        for j in range(panels.count):
            left, right = (source.pieces(j) for source in sources)
            if j + 1 < panels.count:
                for source in sources:
                    source.post(j + 1)
            yield j, left, right


def _clear(work: Work, operands: Sequence[Operand], c: Block) -> None:
    """Scale `c` by beta if nothing will be added to it: this rank's range of some summed letter is empty."""
    a = operands[0]
    extents = dict(zip(a.letters, box_shape(a.want[a.me]), strict=True))
    if any(extents[letter] == 0 for letter in work.sub.k):
        blas.scale(c, work.beta)
