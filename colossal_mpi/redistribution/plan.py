"""Plans of redistributions: which boxes of the global array each rank sends, receives and sums.

`colossal_mpi.redistribution.execute` carries the plans out, and linalg asks for their steps and their words to price a
product. Everything here is arithmetic on metadata that all ranks have: nothing moves.

A redistribution reduces partial sums first: one reduce_scatter over the axes that cut the result, then one allreduce
over the rest. Where the target cuts a dim over an axis on which the source is replicated, each sums only the elements
that this rank needs afterwards. Then one exchange over the axes whose place changed brings each rank exactly the
elements that it lacks: an all_to_all, an allgather where the whole group wants the same box, or a local slice where
nothing is lacking. Moving one axis at a time instead would cost up to 4 times the words (to swap row and col).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, Box, Layout, box_shape, coords_of, intersect, part, rank_of, slices

Shape = tuple[int, ...]
Index = tuple[slice, ...]
"""The slices of a box in a block."""


@dataclass(frozen=True)
class Reduction:
    """A sum of partial blocks over some axes: a reduce_scatter of their pieces, or an allreduce of a single piece.

    Parameters
    ----------
    axes : tuple of str
        The axes that span the group, in the order of the grid.
    pieces : list of tuple of slice
        The piece of this rank's block that is summed on rank 0, 1, ... of the group; a single piece where all ranks get
        the same sum.
    counts : list of int
        The elements of each piece.
    shape : tuple of int
        The shape of this rank's piece.
    packed : bool
        Whether the pieces, one after the other, are the block as it lies in C order.
    """

    axes: Axes
    pieces: list[Index]
    counts: list[int]
    shape: Shape
    packed: bool

    @property
    def replicated(self) -> bool:
        """True if all ranks of the group get the whole sum, by an allreduce."""
        return len(self.pieces) == 1


@dataclass(frozen=True)
class Exchange:
    """An exchange in the group that `axes` span, which brings each rank the boxes that it lacks."""

    axes: Axes
    send: list[Index]
    """The slices of this rank's block before the exchange that go to each rank."""
    send_counts: list[int]
    recv: list[Index]
    """The slices of this rank's block after the exchange that come from each rank."""
    recv_counts: list[int]
    starts: list[int] | None
    """The offset of each received piece in the flat result; None unless all of them are contiguous there."""
    most: int
    """A bound on the elements that any rank of the group sends or receives."""
    same: bool
    """True if the whole group wants the same box, so that an allgather brings it."""
    shape: Shape
    """The shape of this rank's block after the exchange."""
    shapes: list[Shape]
    """The shapes of the blocks of the group before the exchange."""
    sources: list[Index]
    """The slices of each received piece in the block of the rank that sends it."""


@dataclass(frozen=True)
class Plan:
    """The steps of this rank from one layout to another.

    Parameters
    ----------
    reductions : tuple of Reduction
        The sums, which come first.
    exchange : Exchange or None
        The exchange after the sums; None where nothing moves.
    keep : bool
        Whether this rank keeps its block: False where the result is a partial sum whose value another rank holds, so
        that this rank holds zeros.
    about : (tuple of int, Layout, Layout)
        The global shape of the array, its layout and the layout that it gets.
    """

    reductions: tuple[Reduction, ...]
    exchange: Exchange | None
    keep: bool
    about: tuple[Shape, Layout, Layout]

    @property
    def axes(self) -> Axes:
        """The axes of all steps, which span the ranks that communicate."""
        groups = [*(reduction.axes for reduction in self.reductions), *([self.exchange.axes] if self.exchange else [])]
        return tuple(dict.fromkeys(axis for group in groups for axis in group))

    @property
    def route(self) -> tuple[object, ...]:
        """The groups and kinds of the steps; redistributions with equal routes can share their messages."""
        sums = tuple((reduction.axes, reduction.replicated) for reduction in self.reductions)
        return sums, self.exchange and self.exchange.axes


def cotangent(layout: Layout) -> Layout:
    """Return the layout in which the cotangent of an array in `layout` is held: partial axes made replicated.

    A redistribution is the identity on the global array. Its adjoint is a redistribution of the cotangent to the
    source's layout with its partial axes made replicated; nothing is ever divided by a number of ranks.

    Parameters
    ----------
    layout : Layout
        The layout of the array.

    Returns
    -------
    Layout
        The same cut without partial sums.
    """
    return layout.with_partial()


def group_coords(axes: Sequence[str], grid: Grid) -> list[dict[str, int]]:
    """Return the coordinates on the whole grid of the ranks of a group, in the order of its ranks.

    Parameters
    ----------
    axes : sequence of str
        The axes that span the group of this rank.
    grid : Grid
        The grid.

    Returns
    -------
    list of dict of str to int
        The coordinates of rank 0, 1, ... of the group.
    """
    return [{**grid.coords, **grid.coords_of(r, axes)} for r in range(grid.extent(axes))]


def _rank_in(axes: Sequence[str], grid: Grid) -> int:
    return rank_of(grid.coords, {axis: grid.axes[axis] for axis in grid.ordered(axes)})


@lru_cache(maxsize=4096)
def stages(source: Layout, target: Layout) -> tuple[Axes, Layout, Axes]:
    """Return how the partial sums of a redistribution are reduced.

    Parameters
    ----------
    source, target : Layout
        Checked layouts (`Layout.on`), without axes of size 1.

    Returns
    -------
    scattered : tuple of str
        The axes of the reduce_scatter.
    middle : Layout
        The layout that it leaves, from which the exchange starts.
    replicated : tuple of str
        The axes of the allreduce.
    """
    summed = [axis for axis in source.partial if axis not in target.partial]
    scattered = tuple(axis for axis in target.cut if axis in summed)
    free = [axis for axis in target.cut if axis not in (*source.cut, *source.partial)] if summed else []
    dims = [_middle(have, want, scattered, free) for have, want in zip(source.dims, target.dims, strict=True)]
    middle = Layout(*dims, partial=[a for a in source.partial if a not in scattered])
    return scattered, middle, tuple(axis for axis in summed if axis not in scattered)


def _middle(have: Axes, want: Axes, scattered: Axes, free: Sequence[str]) -> Axes:
    """Return the axes that cut a dim after the sums: its reduce_scatter's, and any that slice it for free.

    An axis over which the source is replicated slices the terms before the sum, since the rest would be dropped after
    it.
    """
    taken = have
    if want[: len(have)] == have:
        taken += tuple(itertools.takewhile(lambda axis: axis in scattered or axis in free, want[len(have) :]))
    return (*taken, *(axis for axis in want if axis in scattered and axis not in taken))


def received(shape: Shape, source: Layout, target: Layout, sizes: Mapping[str, int]) -> list[int]:
    """Return the words that each rank of a grid receives in a redistribution; it needs no grid.

    Parameters
    ----------
    shape : tuple of int
        The global shape of the array.
    source, target : Layout
        Checked layouts (`Layout.on`), without axes of size 1.
    sizes : mapping of str to int
        The size of each axis of the grid, outermost first.

    Returns
    -------
    list of int
        The words of rank 0, 1, ...
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


def plan_redistribution(shape: Shape, source: Layout, target: Layout, grid: Grid) -> Plan:
    """Return the steps from one layout to another; both are checked and without axes of size 1.

    Parameters
    ----------
    shape : tuple of int
        Global shape.
    source, target : Layout
        The layouts.
    grid : Grid
        The grid of the array.

    Returns
    -------
    Plan
        Reductions, the exchange of boxes, and whether this rank keeps its values or holds zeros.
    """
    scattered, middle, rest = stages(source, target)
    reductions = []
    if scattered:
        reductions.append(plan_reduce_scatter(shape, source, middle, scattered, grid))
    if rest:
        own = middle.box(shape, grid.axes, grid.coords)
        before = own if scattered else source.box(shape, grid.axes, grid.coords)
        reductions.append(_reduction(grid.ordered(rest), [own], before, box_shape(own)))
    fresh = [axis for axis in target.partial if axis not in source.partial]
    keep = all(grid.coords[axis] == 0 for axis in fresh)
    return Plan(tuple(reductions), _layout_exchange(shape, middle, target, grid), keep, (shape, source, target))


def plan_reduce_scatter(
    shape: Shape, source: Layout, target: Layout, axes: Axes, grid: Grid, within: Box | None = None
) -> Reduction:
    """Return the plan of a reduce_scatter over `axes` from one layout to another.

    Parameters
    ----------
    shape : tuple of int
        The global shape of the array.
    source, target : Layout
        The layouts before and after: the source is partial over `axes`, the target is cut by them.
    axes : tuple of str
        The axes that span the group.
    grid : Grid
        The grid.
    within : box, optional
        The box of global indices that this rank's block covers; by default its whole block in `source`.

    Returns
    -------
    Reduction
        The plan, for `reduce`.
    """
    origin = within or source.box(shape, grid.axes, grid.coords)
    boxes = [intersect(target.box(shape, grid.axes, coords), origin) for coords in group_coords(axes, grid)]
    return _reduction(grid.ordered(axes), boxes, origin, box_shape(boxes[_rank_in(axes, grid)]))


def _reduction(axes: Axes, boxes: Sequence[Box], origin: Box, shape: Shape) -> Reduction:
    counts = [math.prod(box_shape(box)) for box in boxes]
    starts = _flat_starts(boxes, origin)
    packed = starts is not None and sum(counts) == math.prod(box_shape(origin))
    if starts is not None:
        ends = [0, *itertools.accumulate(counts)]
        packed &= all(start == end for start, end, n in zip(starts, ends, counts, strict=False) if n)
    return Reduction(axes, [slices(box, origin) for box in boxes], counts, shape, packed)


def moved_axes(source: Layout, target: Layout, grid: Grid) -> Axes:
    """Return the axes that cut the source and whose place changes: they span the ranks that exchange.

    Parameters
    ----------
    source, target : Layout
        Checked layouts of one array.
    grid : Grid
        The grid.

    Returns
    -------
    tuple of str
        The axes, in the order of the grid.
    """
    axes: list[str] = []
    for have, want in zip(source.dims, target.dims, strict=True):
        common = 0
        while common < min(len(have), len(want)) and have[common] == want[common]:
            common += 1
        axes += have[common:]
    return grid.ordered(axes)


def _layout_exchange(shape: Shape, source: Layout, target: Layout, grid: Grid) -> Exchange | None:
    """Plan the exchange: along axes that replicate the source, a rank and its sender have the same coordinate."""
    if source.dims == target.dims:
        return None
    axes = moved_axes(source, target, grid)
    have, want = ([lay.box(shape, grid.axes, at) for at in group_coords(axes, grid)] for lay in (source, target))
    return plan_exchange(have, want, axes, grid)


def plan_exchange(have: Sequence[Box], want: Sequence[Box], axes: Axes, grid: Grid) -> Exchange:
    """Return the plan of an exchange of boxes of one global index space among the ranks of a group.

    Parameters
    ----------
    have, want : sequence of Box
        The box of each rank's block before and after the exchange, in the order of the ranks.
    axes : tuple of str
        The axes that span the group; none for this rank alone.
    grid : Grid
        The grid.

    Returns
    -------
    Exchange
        The plan of this rank.
    """
    me = _rank_in(axes, grid)
    send = [intersect(have[me], box) for box in want]
    recv = [intersect(box, want[me]) for box in have]
    return Exchange(
        axes,
        [slices(box, have[me]) for box in send],
        [math.prod(box_shape(box)) for box in send],
        [slices(box, want[me]) for box in recv],
        [math.prod(box_shape(box)) for box in recv],
        _flat_starts(recv, want[me]),
        len(have) * max(math.prod(box_shape(box)) for box in (*have, *want)),
        all(box == want[0] for box in want),
        box_shape(want[me]),
        [box_shape(box) for box in have],
        [slices(box, origin) for box, origin in zip(recv, have, strict=True)],
    )


def _flat_starts(pieces: Sequence[Box], whole: Box) -> list[int] | None:
    """Return the offsets at which `pieces` lie in the flat block `whole`, or None unless all are contiguous there."""
    shape, starts = box_shape(whole), []
    for piece in pieces:
        extents = box_shape(piece)
        cut = next((d for d, (n, full) in enumerate(zip(extents, shape, strict=True)) if n != full), 0)
        if 0 in extents:
            starts.append(0)
        elif math.prod(extents[:cut]) == 1 and extents[cut + 1 :] == shape[cut + 1 :]:
            low = [start - origin for (start, _), (origin, _) in zip(piece, whole, strict=True)]
            starts.append(sum(lo * math.prod(shape[d + 1 :]) for d, lo in enumerate(low)))
        else:
            return None
    return starts
