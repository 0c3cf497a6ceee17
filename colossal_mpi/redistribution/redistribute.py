"""The only way from one layout to another.

Partial sums come first: one reduce_scatter over the axes that cut the result, then one allreduce over the rest, of what
this rank will need of a dim that the target cuts over an axis on which the source is replicated.
Then one exchange over the axes whose place changed, in which each rank receives exactly what it lacks: an
all_to_all, or an allgather where the whole group wants the same, or a local slice where nothing is lacking.
Moving one axis at a time instead would cost up to 4x the words (swapping row and col).

Redistribution is the identity on the global array. Its **adjoint** is a redistribution of the cotangent to
the source's layout with its partial axes made replicated (`cotangent`); nothing is ever divided by a number of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from colossal_mpi import comm
from colossal_mpi.comm import messages
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, Box, Layout, box_shape, coords_of, intersect, part, rank_of, slices
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution import boxes
from colossal_mpi.redistribution.boxes import Exchange, group_coords, readable

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """Sum partial blocks over `axes`; piece r of the block goes to rank r of the group, a single one to all."""

    axes: Axes
    pieces: list[tuple[slice, ...]]
    counts: list[int]
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """The steps from one layout to another on this rank."""

    reductions: tuple[Reduction, ...]
    exchange: Exchange | None
    keep: bool
    """False where the result is a partial sum whose value another rank holds: this rank holds zeros."""


def cotangent(layout: Layout) -> Layout:
    """Return the layout in which the cotangent of an array in `layout` is held: partial made replicated."""
    return layout.with_partial()


def redistribute(block: Block, shape: Shape, source: Layout, target: Layout, grid: Grid) -> Block:
    """Return this rank's block of the same global array in another layout.

    Parameters
    ----------
    block : array
        This rank's block of the array of global `shape` in layout `source` on `grid`.
    shape : tuple of int
    source, target : Layout
        Checked layouts (`Layout.on`), without axes of size 1.
    grid : Grid

    Returns
    -------
    array
        The block itself when nothing changes; a view of it where a local slice does.

    Notes
    -----
    **Communication:** see the module; the exchange receives the words of the target block that are not in the source
    block. **Adjoint:** `redistribute` of the cotangent to ``cotangent(source)``.
    """
    if source == target:
        return block
    plan = plan_of(shape, source, target, grid)
    for reduction in plan.reductions:
        block = reduce(block, reduction, grid)
    if plan.exchange is not None:
        block = boxes.exchange(block, plan.exchange, grid)
    return block if plan.keep else backend.zeros_like(block, block.shape)


def plan_of(shape: Shape, source: Layout, target: Layout, grid: Grid) -> Plan:
    """Return the steps from one checked layout to another, which the grid keeps."""
    key = (shape, source, target)
    plan: Plan | None = grid.plans.get(key)
    if plan is None:
        plan = grid.plans[key] = _plan(shape, source, target, grid)
    return plan


@lru_cache(maxsize=4096)
def stages(source: Layout, target: Layout) -> tuple[Axes, Layout, Axes]:
    """Return the axes of the reduce_scatter, the layout that it leaves, and the axes of the allreduce."""
    summed = [axis for axis in source.partial if axis not in target.partial]
    scattered = tuple(axis for axis in target.cut if axis in summed)
    free = [axis for axis in target.cut if axis not in (*source.cut, *source.partial)] if summed else []
    dims = [_middle(have, want, scattered, free) for have, want in zip(source.dims, target.dims, strict=True)]
    middle = Layout(*dims, partial=[a for a in source.partial if a not in scattered])
    return scattered, middle, tuple(axis for axis in summed if axis not in scattered)


def _middle(have: Axes, want: Axes, scattered: Axes, free: Sequence[str]) -> Axes:
    """Return how a dim is cut after the sums: by the axes of its reduce_scatter, and by those that slice it for free.

    An axis over which the source is replicated slices before the sum what would be thrown away after it.
    """
    taken = have
    if want[: len(have)] == have:
        taken += tuple(itertools.takewhile(lambda axis: axis in scattered or axis in free, want[len(have) :]))
    return (*taken, *(axis for axis in want if axis in scattered and axis not in taken))


def received(shape: Shape, source: Layout, target: Layout, sizes: Mapping[str, int]) -> list[int]:
    """Return the words that each rank of a grid of these axes receives in a redistribution. Needs no MPI.

    Parameters are those of `redistribute`, the layouts checked and without axes of size 1.
    """
    scattered, middle, rest = stages(source, target)
    p, q = (math.prod(sizes[axis] for axis in axes) for axes in (scattered, rest))
    words = []
    for rank in range(math.prod(sizes.values())):
        coords = coords_of(rank, sizes)
        have, want = (layout.box(shape, sizes, coords) for layout in (middle, target))
        own = math.prod(box_shape(have))
        low, high = part(own, q, rank_of(coords, {axis: sizes[axis] for axis in sizes if axis in rest}))
        lacking = math.prod(box_shape(want)) - math.prod(box_shape(intersect(have, want)))
        words.append((p - 1) * own + (q - 2) * (high - low) + own + lacking)
    return words


def _plan(shape: Shape, source: Layout, target: Layout, grid: Grid) -> Plan:
    scattered, middle, rest = stages(source, target)
    reductions = []
    if scattered:
        reductions.append(scatter(shape, source, middle, scattered, grid))
    if rest:
        own = middle.box(shape, grid.axes, grid.coords)
        before = own if scattered else source.box(shape, grid.axes, grid.coords)
        reductions.append(Reduction(grid.ordered(rest), [slices(own, before)], [], box_shape(own)))
    fresh = [axis for axis in target.partial if axis not in source.partial]
    keep = all(grid.coords[axis] == 0 for axis in fresh)
    return Plan(tuple(reductions), _exchange_plan(shape, middle, target, grid), keep)


def scatter(
    shape: Shape, source: Layout, middle: Layout, axes: Axes, grid: Grid, within: Box | None = None
) -> Reduction:
    """Return the reduce_scatter over `axes` from one layout to another, of the whole block or of the box `within`."""
    origin = within or source.box(shape, grid.axes, grid.coords)
    boxes = [intersect(middle.box(shape, grid.axes, coords), origin) for coords in group_coords(axes, grid)]
    own = boxes[grid.comm(axes).rank]
    return Reduction(
        grid.ordered(axes),
        [slices(box, origin) for box in boxes],
        [math.prod(box_shape(box)) for box in boxes],
        box_shape(own),
    )


def moved_axes(source: Layout, target: Layout, grid: Grid) -> Axes:
    """Return the axes that cut the source and whose place changes: they span the ranks that exchange."""
    axes: list[str] = []
    for have, want in zip(source.dims, target.dims, strict=True):
        common = 0
        while common < min(len(have), len(want)) and have[common] == want[common]:
            common += 1
        axes += have[common:]
    return grid.ordered(axes)


def _exchange_plan(shape: Shape, source: Layout, target: Layout, grid: Grid) -> Exchange | None:
    """Plan who sends what: along axes that replicate the source, a rank's sender shares its coordinate."""
    if source.dims == target.dims:
        return None
    axes = moved_axes(source, target, grid)
    have, want = ([lay.box(shape, grid.axes, at) for at in group_coords(axes, grid)] for lay in (source, target))
    return boxes.plan(have, want, axes, grid)


def reduce(block: Block, reduction: Reduction, grid: Grid) -> Block:
    """Return this rank's piece of the sum."""
    if len(reduction.pieces) == 1:
        return comm.allreduce(block[(*reduction.pieces[0], ...)], grid, reduction.axes)
    if readable(block, [block.shape], grid, reduction.axes) and block.dtype.itemsize > 2:
        total = _reduce_reading(block, reduction, grid)
        if total is not None:
            return total
    xp = backend.namespace(block)
    flat = comm.reduce_scatter(boxes.pack(block, reduction.pieces), grid, reduction.axes, reduction.counts)
    return xp.reshape(flat, reduction.shape)


def _reduce_reading(block: Block, reduction: Reduction, grid: Grid) -> Block | None:
    """Add to this rank's own piece those of the others, from the rank before it backwards, where they lie."""
    p = grid.extent(reduction.axes)
    me = grid.comm(reduction.axes).rank
    total = grid.empty(reduction.shape, block.dtype)
    words = (p - 1) * math.prod(reduction.shape)
    with messages.reading(block, grid, reduction.axes, [block.shape] * p, words) as blocks:
        if blocks is None:
            return None
        total[...] = block[reduction.pieces[me]]
        for step in range(1, p):
            np.add(total, blocks[(me - step) % p][reduction.pieces[me]], out=total)
    return total
