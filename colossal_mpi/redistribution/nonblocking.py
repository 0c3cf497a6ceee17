"""Redistributions that go on while the rank computes, those of several arrays in the same messages.

Everything goes from rank to rank: a reduce_scatter as the pieces of each rank's sum, which that rank adds at the end,
an allreduce as one and an allgather. Words are those of `colossal_mpi.redistribution.redistribute`. The terms of a sum
are added in the order of the ranks: whatever shares its messages, and whichever comes first, its bits are the same.

Sums need this rank between their messages: `Moving.done`, called now and then, lets the second phase of an allreduce
begin.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from colossal_mpi import comm
from colossal_mpi.comm import messages
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Axes, Layout, part
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution.boxes import Exchange, pack, unpack
from colossal_mpi.redistribution.redistribute import Plan, Reduction, plan_of

Steps: TypeAlias = Generator[messages.Pending, None, list[Block]]
"""Exchanges, each of which ends before the next begins, and the blocks after the last."""
_FIRST, _STREAMS = 16, 1 << 13
"""The first stream of messages here, and how many there are: more are never under way in one group."""


class _Started:
    """Steps under way."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self.blocks = steps, list[Block]()
        self._pending: messages.Pending | None = None
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._pending = next(self._steps)
        except StopIteration as end:
            self._pending, self.blocks = None, end.value

    def done(self) -> bool:
        while self._pending is not None and self._pending.done():
            self._go_on()
        return self._pending is None

    def wait(self) -> list[Block]:
        while self._pending is not None:
            self._pending.wait()
            self._go_on()
        return self.blocks


@dataclass(frozen=True)
class _Place:
    """What an array is to be, and its number among those that move."""

    number: int
    shape: tuple[int, ...]
    layout: Layout
    grid: Grid


class Moving:
    """Arrays on their way into other layouts; `wait` returns them."""

    def __init__(self, places: dict[int, DistArray], routes: list[tuple[list[_Place], _Started]]) -> None:
        self._there, self._routes = places, routes

    def done(self) -> bool:
        """Say, without waiting, whether all are there; what has to follow messages that have come is begun."""
        return sum(started.done() for _, started in self._routes) == len(self._routes)  # asks every one

    def wait(self) -> list[DistArray]:
        """Wait for the messages and return the arrays, in the order in which they were given."""
        for places, started in self._routes:
            for place, block in zip(places, started.wait(), strict=True):
                self._there[place.number] = DistArray(block, place.shape, place.layout, place.grid)
        self._routes = []
        return [self._there[i] for i in range(len(self._there))]


def redistribute(arrays: Sequence[DistArray], layouts: Sequence[Layout]) -> Moving:
    """Begin to bring arrays into other layouts, and return while the messages are under way.

    What goes the same way, over the same axes and in the same dtype, shares its messages. The arrays must not be
    written to before `Moving.wait`. Every rank of the grid begins the same redistributions in the same order.

    Parameters
    ----------
    arrays : sequence of DistArray
        On one grid.
    layouts : sequence of Layout

    **Communication:** that of `DistArray.redistribute`, all as messages from rank to rank.
    **Adjoint:** the redistributions of the cotangents back.
    """
    there, routes = dict[int, DistArray](), dict[Any, list[tuple[_Place, Plan, Block]]]()
    for i, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
        layout = layout.on(array.grid.axes, array.ndim)
        if layout == array.layout:
            there[i] = array
            continue
        plan = plan_of(array.shape, array.layout, layout, array.grid)
        place = _Place(i, array.shape, layout, array.grid)
        routes.setdefault((_route(plan), str(array.dtype)), []).append((place, plan, array.local))
    return Moving(there, [_begun(members) for members in routes.values()])


def _begun(members: list[tuple[_Place, Plan, Block]]) -> tuple[list[_Place], _Started]:
    places, plans, blocks = (list(side) for side in zip(*members, strict=True))
    return places, _Started(_steps(blocks, plans, places[0].grid))


def _route(plan: Plan) -> Any:
    """Return what arrays must have in common to share messages."""
    sums = tuple((reduction.axes, len(reduction.pieces) == 1) for reduction in plan.reductions)
    return sums, plan.exchange and plan.exchange.axes


def _steps(blocks: list[Block], plans: Sequence[Plan], grid: Grid) -> Steps:
    """Go the way of the plans. All streams are taken at the beginning, when all ranks take theirs."""
    moves = [list(move) for move in zip(*[plan.reductions for plan in plans], strict=True)]
    streams = [_stream(grid, move[0].axes) for move in moves]
    exchanges = [plan.exchange for plan in plans if plan.exchange is not None]
    last = _stream(grid, exchanges[0].axes) if exchanges else 0
    for move, stream in zip(moves, streams, strict=True):
        blocks = yield from (_allreduce if len(move[0].pieces) == 1 else _reduce_scatter)(blocks, move, grid, stream)
    if exchanges:
        blocks = yield from _exchange(blocks, exchanges, grid, last)
    return [
        block if plan.keep else backend.zeros_like(block, block.shape)
        for block, plan in zip(blocks, plans, strict=True)
    ]


def _stream(grid: Grid, axes: Axes) -> int:
    """Return the first of two streams of messages that no other redistribution of the group uses now."""
    return _FIRST + 2 * grid.number(axes) % _STREAMS


def _reduce_scatter(blocks: list[Block], reductions: list[Reduction], grid: Grid, stream: int) -> Steps:
    axes = reductions[0].axes
    pieces = [
        _joined([pack(block, [r.pieces[rank]]) for block, r in zip(blocks, reductions, strict=True)])
        for rank in range(grid.extent(axes))
    ]
    counts = [r.counts[grid.comm(axes).rank] for r in reductions]
    dtype = blocks[0].dtype
    del blocks  # what is sent has been packed
    own = comm.cast((yield from _sum(pieces, grid, axes, stream)), dtype)
    return [
        backend.namespace(own).reshape(piece, r.shape)
        for piece, r in zip(_parted(own, counts), reductions, strict=True)
    ]


def _sum(pieces: list[Block], grid: Grid, axes: Axes, stream: int) -> Generator[messages.Pending, None, Block]:
    """Return this rank's piece of the sum; piece r of every rank goes to rank r."""
    pieces, me = [comm.widened(piece) for piece in pieces], grid.comm(axes).rank
    own = pieces[me]
    terms = [own if r == me else backend.empty_like(own, own.shape) for r in range(len(pieces))]
    send, recv = ([(r, block) for r, block in _ranks(side) if r != me] for side in (pieces, terms))
    pending = messages.start(grid, axes, send, recv, stream, "reduce_scatter")
    del pieces, send, recv
    yield pending
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total


def _ranks(blocks: Sequence[Block]) -> list[tuple[int, Block]]:
    return list(enumerate(blocks))


def _allreduce(blocks: list[Block], reductions: list[Reduction], grid: Grid, stream: int) -> Steps:
    axes, shapes, dtype = reductions[0].axes, [r.shape for r in reductions], blocks[0].dtype
    flat = _joined([pack(block, r.pieces) for block, r in zip(blocks, reductions, strict=True)])
    counts, p = [pack(block, r.pieces).shape[0] for block, r in zip(blocks, reductions, strict=True)], grid.extent(axes)
    del blocks
    if p == 2:  # the ranks swap, the same words in one message
        flat = comm.widened(flat)
        both = yield from _gather(flat, [flat.shape[0]] * 2, grid, axes, stream)
        flat = comm.cast(both[0] + both[1], dtype)
    else:
        bounds = [part(flat.shape[0], p, rank) for rank in range(p)]
        own = comm.cast((yield from _sum([flat[a:b] for a, b in bounds], grid, axes, stream)), dtype)
        flat = _joined((yield from _gather(own, [b - a for a, b in bounds], grid, axes, stream + 1)))
    return [
        backend.namespace(flat).reshape(piece, shape)
        for piece, shape in zip(_parted(flat, counts), shapes, strict=True)
    ]


def _gather(own: Block, counts: Sequence[int], grid: Grid, axes: Axes, stream: int) -> Steps:
    """Return the flat blocks of all ranks of a group."""
    me = grid.comm(axes).rank
    blocks = [own if r == me else backend.empty_like(own, (count,)) for r, count in enumerate(counts)]
    others = [(r, block) for r, block in _ranks(blocks) if r != me]
    yield messages.start(grid, axes, [(r, own) for r, _ in others], others, stream, "allgather")
    return blocks


def _exchange(blocks: list[Block], exchanges: list[Exchange], grid: Grid, stream: int) -> Steps:
    axes, same = exchanges[0].axes, all(e.same for e in exchanges)
    if not axes:
        return [block[e.send[0]] for block, e in zip(blocks, exchanges, strict=True)]
    ranks = grid.extent(axes)
    packed = [
        _joined([pack(block, [e.send[r]]) for block, e in zip(blocks, exchanges, strict=True)])
        for r in range(1 if same else ranks)
    ]
    packed *= ranks // len(packed)
    me, like = grid.comm(axes).rank, blocks[0]
    counts = [sum(e.recv_counts[r] for e in exchanges) for r in range(len(packed))]
    landed = [packed[me] if r == me else backend.empty_like(like, (count,)) for r, count in enumerate(counts)]
    send, recv = ([(r, b) for r, b in _ranks(side) if r != me and b.shape[0]] for side in (packed, landed))
    pending = messages.start(grid, axes, send, recv, stream, "allgather" if same else "all_to_all")
    del packed, send, recv, blocks
    yield pending
    parted = [_parted(block, [e.recv_counts[r] for e in exchanges]) for r, block in _ranks(landed)]
    return [unpack([pieces[i] for pieces in parted], e, like) for i, e in enumerate(exchanges)]


def _joined(flat: Sequence[Block]) -> Block:
    return flat[0] if len(flat) == 1 else backend.namespace(flat[0]).concat(list(flat))


def _parted(flat: Block, counts: Sequence[int]) -> list[Block]:
    """Return the pieces of a flat block, one after the other."""
    stops = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [flat[stop - count : stop] for stop, count in zip(stops, counts, strict=True)]
