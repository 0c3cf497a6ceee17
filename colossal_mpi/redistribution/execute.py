"""Redistributions of blocks, blocking or nonblocking, by one engine.

`colossal_mpi.distarray` and the products of linalg call it, with plans of `colossal_mpi.redistribution.plan`. Every
step is written once, as a generator on a `comm.Transport`: a blocking redistribution takes the steps of one that is
started and waited for, on a transport whose requests are completed when they are made. So both move the same words, and
their sums have the same bits: `comm` adds them in the order of the ranks. In a blocking redistribution the ranks of one
node read large blocks where they lie, and send nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from colossal_mpi.comm import (
    Announced,
    BlockingTransport,
    MessageTransport,
    Request,
    Started,
    Steps,
    Transport,
    add_in_rank_order,
    check,
    pieces_of,
    reading,
)
from colossal_mpi.grid import Grid, GridCache
from colossal_mpi.layout import Axes, Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution.plan import Exchange, Index, Plan, Reduction, Shape, plan_redistribution

READ_FROM = 1 << 18
"""Size in bytes of a group's largest block from which on the ranks of one node read each other's memory."""
_PLANS = GridCache[tuple[Shape, Layout, Layout], Plan](limit=4096)


def redistribute(block: Block, shape: Shape, source: Layout, target: Layout, grid: Grid) -> Block:
    """Return this rank's block of the same global array in another layout.

    Parameters
    ----------
    block : array
        This rank's block of the array of global `shape` in layout `source` on `grid`.
    shape : tuple of int
        The global shape.
    source, target : Layout
        Checked layouts (`Layout.on`), without axes of size 1.
    grid : Grid
        The grid.

    Returns
    -------
    array
        The block itself when nothing changes; a view of it where a local slice is enough.

    Notes
    -----
    **Communication:** a reduce_scatter over the partial axes that cut the target, an allreduce over the other partial
    axes, and an all_to_all or allgather over the axes whose place changes, in which a rank receives the words of its
    target block that are not in its source block. **Adjoint:** `redistribute` of the cotangent to
    ``cotangent(source)``.
    """
    if source == target:
        return block
    plan = plan_of(shape, source, target, grid)
    with check.call("redistribute", grid, plan.axes, dtype=block.dtype, shape=shape, source=source, target=target):
        return Started(_steps([block], [plan], grid, _transports([plan], grid, BlockingTransport))).wait()[0]


def start(blocks: Sequence[Block], plans: Sequence[Plan], grid: Grid) -> Request[list[Block]]:
    """Begin redistributions that share their messages, and return while these are under way.

    Parameters
    ----------
    blocks : sequence of array
        This rank's blocks, of one dtype; nobody may write to them before the end.
    plans : sequence of Plan
        Plans with the same `Plan.route`.
    grid : Grid
        The grid, all of whose ranks begin the same redistributions in the same order.

    Returns
    -------
    Request
        A request for the blocks in the other layouts.

    Notes
    -----
    **Communication:** the words of `redistribute`, all as messages from rank to rank. **Adjoint:** the redistributions
    of the cotangents back.
    """
    # begun here and compared at the end: a check that waited now would make the ranks wait for one another
    call = check.begin("start_redistribution", grid, plans[0].axes, dtype=blocks[0].dtype, arrays=_About(plans))
    begun = Started(_steps(list(blocks), plans, grid, _transports(plans, grid, MessageTransport)))
    return begun if call is None else Announced(call, begun)


class _About:
    """The text that names the arrays and layouts of some plans; it is made only where calls are checked."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    def __str__(self) -> str:
        return ", ".join(
            f"{shape} from {source} to {target}" for shape, source, target in (p.about for p in self._plans)
        )


def plan_of(shape: Shape, source: Layout, target: Layout, grid: Grid) -> Plan:
    """Return the steps from one layout to another, and keep them for the grid.

    Parameters
    ----------
    shape : tuple of int
        The global shape of the array.
    source, target : Layout
        Checked layouts (`Layout.on`), without axes of size 1.
    grid : Grid
        The grid.

    Returns
    -------
    Plan
        The steps of this rank, for `start`.
    """
    key = (shape, source, target)
    return _PLANS.get(grid, key, lambda: plan_redistribution(shape, source, target, grid))


def reduce(block: Block, reduction: Reduction, grid: Grid) -> Block:
    """Return this rank's piece of a sum of partial blocks.

    Parameters
    ----------
    block : array
        This rank's term, in the layout from which the reduction was planned.
    reduction : Reduction
        The plan.
    grid : Grid
        The grid.

    Returns
    -------
    array
        The piece, of the dtype of the block.

    Notes
    -----
    **Communication:** a reduce_scatter over the axes of the plan, ``(p - 1) own`` words received, or an allreduce.
    **Adjoint:** an allgather of the cotangent's pieces.
    """
    return Started(_reduce([block], [reduction], grid, BlockingTransport(grid, reduction.axes))).wait()[0]


def exchange(block: Block, plan: Exchange, grid: Grid) -> Block:
    """Return this rank's block after an exchange; a view of `block` where nothing moves."""
    if not plan.axes:
        return _sliced([block], [plan])[0]
    return Started(_exchange([block], [plan], grid, BlockingTransport(grid, plan.axes))).wait()[0]


def readable(block: Block, shapes: Sequence[Shape], grid: Grid, axes: Axes) -> bool:
    """Return whether the ranks of a group should read each other's blocks in place; the same on all of them.

    Parameters
    ----------
    block : array
        This rank's block.
    shapes : sequence of tuple of int
        The shapes of the blocks of all ranks of the group.
    grid : Grid
        The grid.
    axes : tuple of str
        The axes that span the group.

    Returns
    -------
    bool
        True if the blocks are large, in host memory, and on one node.
    """
    if not grid.shares or type(block) is not np.ndarray or block.dtype.kind not in "fciu":
        return False
    return max(map(math.prod, shapes)) * block.dtype.itemsize >= READ_FROM and grid.peers(axes) is not None


def _transports(
    plans: Sequence[Plan], grid: Grid, kind: type[BlockingTransport] | type[MessageTransport]
) -> list[Transport]:
    """Return a transport for each step, but a local slice, of plans of one route.

    All are made at the beginning, when all ranks begin the same redistributions; this keeps their messages apart.
    """
    first = plans[0]
    groups = [reduction.axes for reduction in first.reductions]
    if first.exchange is not None and first.exchange.axes:
        groups.append(first.exchange.axes)
    return [kind(grid, axes) for axes in groups]


def _steps(blocks: list[Block], plans: Sequence[Plan], grid: Grid, groups: Sequence[Transport]) -> Steps[list[Block]]:
    """Take the steps of plans of one route together."""
    for reductions, group in zip(zip(*[plan.reductions for plan in plans], strict=True), groups, strict=False):
        blocks = yield from _reduce(blocks, reductions, grid, group)
    exchanges = [plan.exchange for plan in plans if plan.exchange is not None]
    if exchanges and exchanges[0].axes:
        blocks = yield from _exchange(blocks, exchanges, grid, groups[-1])
    elif exchanges:
        blocks = _sliced(blocks, exchanges)
    return [
        block if plan.keep else backend.zeros_like(block, block.shape)
        for block, plan in zip(blocks, plans, strict=True)
    ]


def _sliced(blocks: Sequence[Block], exchanges: Sequence[Exchange]) -> list[Block]:
    """Return the part of each block that this rank keeps, where it lacks nothing."""
    # X[M] -> X[M_axes]: a local slice
    return [block[(*plan.send[0], ...)] for block, plan in zip(blocks, exchanges, strict=True)]


def _reduce(blocks: list[Block], reductions: Sequence[Reduction], grid: Grid, group: Transport) -> Steps[list[Block]]:
    """Reduce blocks over one group, all of them in the same messages."""
    first, shapes = reductions[0], [reduction.shape for reduction in reductions]
    if group.blocking and not first.replicated and readable(blocks[0], [blocks[0].shape], grid, first.axes):
        total = _reduce_reading(blocks[0], first, grid, group)
        if total is not None:
            return [total]
    if len(blocks) == 1 and first.packed:
        flat = backend.namespace(blocks[0]).reshape(blocks[0], (-1,))
    else:
        flat = _packed(blocks, [reduction.pieces for reduction in reductions])
    blocks.clear()  # what is sent has been packed
    if first.replicated:
        # X[M] {U_axes} -> X[M]: allreduce over axes
        request, own = group.allreduce(flat), [reduction.counts[0] for reduction in reductions]
    else:
        # X[M] {U_axes} -> X[M_axes]: reduce_scatter over axes
        counts = [sum(of_rank) for of_rank in zip(*[reduction.counts for reduction in reductions], strict=True)]
        request, own = group.reduce_scatter(flat, counts), [reduction.counts[group.rank] for reduction in reductions]
    del flat
    total = yield request
    xp = backend.namespace(total)
    return [xp.reshape(piece, shape) for piece, shape in zip(pieces_of(total, own), shapes, strict=True)]


def _reduce_reading(block: Block, reduction: Reduction, grid: Grid, group: Transport) -> Block | None:
    """Return this rank's piece of the sum, read from the blocks of all ranks in place; None if they cannot be read."""
    if block.dtype.itemsize <= 2:
        return None  # their sum needs another dtype
    words = (group.size - 1) * math.prod(reduction.shape)
    with reading(block, grid, reduction.axes, [block.shape] * group.size, words) as blocks:
        if blocks is None:
            return None
        piece = (*reduction.pieces[group.rank], ...)
        # X[M] {U_axes} -> X[M_axes]
        return add_in_rank_order([term[piece] for term in blocks], grid.empty(reduction.shape, block.dtype))


def _exchange(blocks: list[Block], exchanges: Sequence[Exchange], grid: Grid, group: Transport) -> Steps[list[Block]]:
    """Exchange boxes of blocks in one group, all of them in the same messages."""
    first, same = exchanges[0], all(plan.same for plan in exchanges)
    if group.blocking and readable(blocks[0], first.shapes, grid, first.axes):
        read = _exchange_reading(blocks[0], first, grid, group)
        if read is not None:
            return [read]
    flat = _packed(blocks, [plan.send[:1] if same else plan.send for plan in exchanges])
    blocks.clear()  # what is sent has been packed
    counts = [sum(of_rank) for of_rank in zip(*[plan.recv_counts for plan in exchanges], strict=True)]
    starts = first.starts if same and len(exchanges) == 1 else None
    if same:
        # X[M_axes] -> X[M]: allgather over axes
        request = group.allgather(flat, counts, starts)
    else:
        # X[M_axes, N] -> X[M, N_axes]: all_to_all over axes
        sent = [sum(of_rank) for of_rank in zip(*[plan.send_counts for plan in exchanges], strict=True)]
        request = group.all_to_all(flat, sent, counts, sum(plan.most for plan in exchanges))
    del flat
    whole = yield request
    if starts is not None:
        return [backend.namespace(whole).reshape(whole, first.shape)]
    return _unpacked(whole, exchanges)


def _exchange_reading(block: Block, plan: Exchange, grid: Grid, group: Transport) -> Block | None:
    """Return this rank's block, filled from the blocks of the group in place; None if they cannot be read."""
    out, words = grid.empty(plan.shape, block.dtype), sum(plan.recv_counts) - plan.recv_counts[group.rank]
    with reading(block, grid, plan.axes, plan.shapes, words) as blocks:
        if blocks is None:
            return None
        for other, source, target in zip(blocks, plan.sources, plan.recv, strict=True):
            out[target] = other[source]
    return out


def _packed(blocks: Sequence[Block], pieces: Sequence[Sequence[Index]]) -> Block:
    """Return pieces of blocks as one flat block, all of rank 0's first; a view where there is one piece."""
    xp = backend.namespace(blocks[0])
    flat = [
        xp.reshape(block[(*of_block[rank], ...)], (-1,))
        for rank in range(len(pieces[0]))
        for block, of_block in zip(blocks, pieces, strict=True)
    ]
    return flat[0] if len(flat) == 1 else xp.concat(flat)


def _unpacked(whole: Block, exchanges: Sequence[Exchange]) -> list[Block]:
    """Return the blocks after an exchange, from the flat pieces that the ranks have sent, rank 0's first."""
    xp, out = backend.namespace(whole), [backend.empty_like(whole, plan.shape) for plan in exchanges]
    places = [
        (block, plan.recv[rank], plan.recv_counts[rank])
        for rank in range(len(exchanges[0].recv))
        for block, plan in zip(out, exchanges, strict=True)
    ]
    for flat, (block, place, count) in zip(pieces_of(whole, [n for *_, n in places]), places, strict=True):
        if count:
            block[place] = xp.reshape(flat, block[place].shape)
    return out
