"""Exchange boxes of a global index space among the ranks of a group: each receives exactly what it lacks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from colossal_mpi import comm
from colossal_mpi.comm import messages
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, Box, box_shape, intersect, slices
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

Shape = tuple[int, ...]
READ_FROM = 1 << 18
"""Bytes of the largest block of a group on one node from which on its ranks read each other's memory."""


@dataclass(frozen=True)
class Exchange:
    """Bring each rank of the group spanned by `axes` the box that it lacks."""

    axes: Axes
    send: list[tuple[slice, ...]]
    send_counts: list[int]
    recv: list[tuple[slice, ...]]
    recv_counts: list[int]
    starts: list[int] | None
    """Where each received piece starts in the flat result, if all of them are contiguous there."""
    most: int
    """A bound on what any rank of the group sends or receives."""
    same: bool
    """Whether the whole group wants the same box, so that an allgather does."""
    shape: Shape
    shapes: list[Shape]
    """Of the blocks of the group before the exchange."""
    theirs: list[tuple[slice, ...]]
    """Where each received piece stands in the block of the rank that has it."""


def group_coords(axes: Sequence[str], grid: Grid) -> list[dict[str, int]]:
    """Return the full coordinates of the ranks of the group spanned by `axes`, in their order."""
    return [{**grid.coords, **grid.coords_of(r, axes)} for r in range(grid.extent(axes))]


def plan(have: Sequence[Box], want: Sequence[Box], axes: Axes, grid: Grid) -> Exchange:
    """Plan an exchange in the group spanned by `axes`.

    Parameters
    ----------
    have, want : sequence of Box
        Of each rank of the group: the box of its block, and the box that it is to have.
    axes : tuple of str
    grid : Grid
    """
    me = grid.comm(axes).rank if axes else 0
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


def _flat_starts(pieces: list[Box], whole: Box) -> list[int] | None:
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


def pack(block: Block, pieces: list[tuple[slice, ...]]) -> Block:
    """Return the pieces of `block` one after the other, flat."""
    xp = backend.namespace(block)
    flat = [xp.reshape(block[piece], (-1,)) for piece in pieces]
    return flat[0] if len(flat) == 1 else xp.concat(flat)


def readable(block: Block, shapes: Sequence[Shape], grid: Grid, axes: Axes) -> bool:
    """Say whether a group had better read each other's blocks where they lie; all of its ranks say the same.

    Parameters
    ----------
    block : array
        This rank's.
    shapes : sequence of tuple of int
        Of the blocks of all ranks of the group.
    grid : Grid
    axes : tuple of str
        That span the group.
    """
    if not grid.shares or type(block) is not np.ndarray or block.dtype.kind not in "fciu":
        return False
    return max(map(math.prod, shapes)) * block.dtype.itemsize >= READ_FROM and grid.peers(axes) is not None


def exchange(block: Block, plan: Exchange, grid: Grid) -> Block:
    """Return this rank's block after the exchange: a view of the one before where nothing has to move."""
    xp = backend.namespace(block)
    if not plan.axes:
        return block[plan.send[0]]
    if readable(block, plan.shapes, grid, plan.axes):
        out = _exchange_reading(block, plan, grid)
        if out is not None:
            return out
    if plan.same:
        own = xp.reshape(block[plan.send[0]], (-1,))
        flat = comm.allgather(own, grid, plan.axes, plan.recv_counts, plan.starts)
    else:
        packed = pack(block, plan.send)
        flat = comm.all_to_all(packed, grid, plan.axes, plan.send_counts, plan.recv_counts, plan.most)
    if plan.same and plan.starts:
        return xp.reshape(flat, plan.shape)
    stops = list(itertools.accumulate(plan.recv_counts))
    return unpack([flat[stop - n : stop] for stop, n in zip(stops, plan.recv_counts, strict=True)], plan, flat)


def _exchange_reading(block: Block, plan: Exchange, grid: Grid) -> Block | None:
    out, me = grid.empty(plan.shape, block.dtype), grid.comm(plan.axes).rank
    words = sum(plan.recv_counts) - plan.recv_counts[me]
    with messages.reading(block, grid, plan.axes, plan.shapes, words) as blocks:
        if blocks is None:
            return None
        for theirs, piece, target in zip(blocks, plan.theirs, plan.recv, strict=True):
            out[target] = theirs[piece]
    return out


def unpack(pieces: Sequence[Block], plan: Exchange, beside: Block) -> Block:
    """Return the block after an exchange, of the flat piece that each rank of the group has sent."""
    xp, out = backend.namespace(beside), backend.empty_like(beside, plan.shape)
    for flat, piece in zip(pieces, plan.recv, strict=True):
        if flat.shape[0]:
            out[piece] = xp.reshape(flat, out[piece].shape)
    return out
