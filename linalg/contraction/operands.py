"""From where a product takes its operands: pieces that lie here, in a neighbour's memory, or come by message.

A product is cut into panels of one letter (or is one panel), and each operand into pieces by the rank that stores
them. Nothing is laid side by side: every pair of pieces that meet is multiplied where it is, into its part of the
result. So an operand in place is never copied, and neither is what a neighbour on the same node stores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from colossal_mpi.comm import Pending, reading, start_exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid, GridCache
from colossal_mpi.layout import Axes, Box, Layout, bounds, box_shape, intersect, part, slices
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution import execute as redistribution
from colossal_mpi.redistribution import group_coords, moved_axes, readable

Piece = tuple[Box, Block]
"""A part of an operand: its global indices and the block that holds it."""


@dataclass(frozen=True)
class Panels:
    """Equal parts, in number, of every rank's local range of one letter; one part of everything if there is none."""

    letter: str = ""
    extent: int = 0
    axes: Axes = ()
    """Those that the map gives the letter, outer to inner."""
    count: int = 1

    @classmethod
    def of(cls, letter: str, extent: int, axes: Axes, grid: Grid, width: int) -> Panels:
        """Return panels of at most `width` indices of a letter."""
        low, high = bounds(extent, axes, grid.axes, dict.fromkeys(axes, 0))
        return cls(letter, extent, axes, max(1, -(-(high - low) // width)))

    def cuts(self, letters: str) -> bool:
        """Say whether an array of these letters is done in panels."""
        return bool(self.letter) and self.letter in letters

    def cut(self, letters: str, box: Box, j: int, grid: Grid, coords: Mapping[str, int]) -> Box:
        """Return the part of `box`, of dims `letters`, that belongs to panel j of the rank at `coords`."""
        if not self.cuts(letters):
            return box
        low, high = bounds(self.extent, self.axes, grid.axes, coords)
        start, stop = part(high - low, self.count, j)
        at = letters.index(self.letter)
        mine = ((low + start, low + stop),)
        return (*box[:at], *intersect(box[at : at + 1], mine), *box[at + 1 :])


@dataclass
class Operand:
    """One operand of a product: what is stored, what the map asks for, and which ranks have it."""

    letters: str
    array: DistArray
    wanted: Layout
    panels: Panels
    side: str
    """Which of the two it is, ``a`` or ``b``."""
    redundant: bool = False
    """Whether it is cut along an axis that the map leaves out, so that several ranks do the same product."""

    def __post_init__(self) -> None:
        array, grid = self.array, self.array.grid
        self.axes = moved_axes(array.layout, self.wanted, grid)
        self.group = group_coords(self.axes, grid)
        self.me = grid.comm(self.axes).rank if self.axes else 0
        self.have = [array.layout.box(array.shape, grid.axes, at) for at in self.group]
        self.want = [self.wanted.box(array.shape, grid.axes, at) for at in self.group]

    @property
    def large(self) -> bool:
        """Whether it moves in blocks that are better used piece by piece than laid side by side; alike on all ranks."""
        array = self.array
        stored = math.prod(box_shape(array.layout.box(array.shape, array.grid.axes, self.first)))
        large = stored * backend.numpy_dtype(array.dtype).itemsize >= redistribution.READ_FROM
        return large and array.layout != self.wanted

    @property
    def first(self) -> dict[str, int]:
        """The coordinates of rank 0, whose blocks are never smaller than another's."""
        return dict.fromkeys(self.array.grid.axes, 0)

    @property
    def largest(self) -> int:
        """Elements that a rank needs, at most."""
        return math.prod(box_shape(self.wanted.box(self.array.shape, self.array.grid.axes, self.first)))

    def parts(self, letters: str) -> int:
        """Return into how many parts what a rank needs is cut along `letters`, by the ranks that store it."""
        dims = zip(self.letters, self.array.layout.dims, strict=True)
        return self.array.grid.extent([axis for x, cut in dims if x in letters for axis in cut if axis in self.axes])

    def moved(self) -> Operand:
        """Return the operand with all that this rank needs side by side."""
        if self.array.layout == self.wanted:
            return self
        return Operand(
            self.letters, self.array.redistribute(self.wanted), self.wanted, self.panels, self.side, self.redundant
        )

    @property
    def streams(self) -> bool:
        """Whether the operand has the letter of the panels."""
        return self.panels.cuts(self.letters)

    def wants(self, rank: int, j: int) -> Box:
        """Return the box that a rank of the group needs for panel j."""
        return self.panels.cut(self.letters, self.want[rank], j, self.array.grid, self.group[rank])

    def own(self, j: int) -> list[Piece]:
        """Return the piece of panel j that this rank stores."""
        return self.part(self.me, self.array.local, j)

    def part(self, rank: int, block: Block, j: int) -> list[Piece]:
        """Return the piece of panel j that a rank of the group, which holds `block`, stores."""
        box = intersect(self.have[rank], self.wants(self.me, j))
        return [] if 0 in box_shape(box) else [(box, block[slices(box, self.have[rank])])]


def bring(operand: Operand, stack: ExitStack, keep: bool) -> InPlace:
    """Return the cheapest way to the pieces of an operand; all ranks of its group choose the same.

    Parameters
    ----------
    operand : Operand
    stack : ExitStack
        Whose end is that of the product.
    keep : bool
        Whether memory for pieces is kept for the next such product, and none is taken for what it has not foreseen: a
        copy of a block that lies outside the memory that neighbours can read.
    """
    array, axes = operand.array, operand.axes
    if not axes:
        return InPlace(operand)
    shapes = [box_shape(box) for box in operand.have]
    if readable(array.local, shapes, array.grid, axes):
        needed, own = operand.want[operand.me], operand.have[operand.me]
        words = math.prod(box_shape(needed)) - math.prod(box_shape(intersect(needed, own)))
        blocks = stack.enter_context(reading(array.local, array.grid, axes, shapes, words, lend=not keep, leaf=False))
        if blocks is not None:
            return Read(operand, blocks)
    return Received(operand, keep)


class InPlace:
    """An operand of which every rank stores what it needs."""

    def __init__(self, operand: Operand) -> None:
        self._operand = operand

    def post(self, j: int) -> None:
        """Begin to bring panel j."""

    def pieces(self, j: int) -> list[Piece]:
        """Return the pieces of panel j, waiting for them if they are under way."""
        return self._operand.own(j)


class Read(InPlace):
    """An operand whose pieces are read where the ranks of the node store them."""

    def __init__(self, operand: Operand, blocks: Sequence[Block]) -> None:
        super().__init__(operand)
        self._blocks = blocks

    def pieces(self, j: int) -> list[Piece]:
        """Return the pieces of panel j, in the same order on all ranks: equal products are equal to the bit."""
        return [piece for rank, block in enumerate(self._blocks) for piece in self._operand.part(rank, block, j)]


class Received(InPlace):
    """An operand whose pieces come by message: those of the next panel while this one is multiplied."""

    def __init__(self, operand: Operand, keep: bool) -> None:
        super().__init__(operand)
        grid, array = operand.array.grid, operand.array
        key = ("pieces", operand.side, operand.letters, array.shape, array.layout, operand.wanted, operand.panels)
        self._plans = _PLANS.get(grid, key, dict)
        self._spaces = kept(grid, (*key, type(array.local), str(array.dtype))) if keep else {}
        self._pending: dict[int, tuple[Pending, list[Piece]]] = {}
        self._whole: list[Piece] | None = None

    def _panel(self, j: int) -> int:
        """Return the panel to bring for panel j: an operand without the letter comes whole, once."""
        return j if self._operand.streams else 0

    def post(self, j: int) -> None:
        """Send the pieces of panel j to the ranks that need them and post the receives."""
        if self._whole is not None or self._panel(j) in self._pending:
            return
        operand, grid = self._operand, self._operand.array.grid
        send, recv = self._plan(j)
        origin, packed, space = operand.have[operand.me], {}, self._space(j)
        for _, box in send:
            if box not in packed:
                packed[box] = space.pack(operand.array.local[slices(box, origin)])
        landing = [(source, box, space.take(box_shape(box), operand.array.local)) for source, box in recv]
        sent = [(to, packed[box]) for to, box in send]
        pending = start_exchange(grid, operand.axes, sent, [(source, block) for source, _, block in landing])
        self._pending[self._panel(j)] = pending, [(box, block) for _, box, block in landing]

    def pieces(self, j: int) -> list[Piece]:
        """Return the pieces of panel j, in the same order on all ranks: equal products are equal to the bit."""
        if self._whole is not None:
            return self._whole
        self.post(j)
        pending, received = self._pending.pop(self._panel(j))
        pending.wait()
        own = self._operand.own(j)
        if self._operand.redundant:  # strides as those of what the others receive: BLAS may round otherwise
            own = [(box, backend.namespace(block).asarray(block, copy=True)) for box, block in own]
        pieces = sorted(own + received, key=lambda piece: piece[0])
        if not self._operand.streams:
            self._whole = pieces
        return pieces

    def _plan(self, j: int) -> tuple[list[tuple[int, Box]], list[tuple[int, Box]]]:
        """Return which box goes to which rank, and which comes from which, for panel j."""
        if self._panel(j) not in self._plans:
            o = self._operand
            others = [rank for rank in range(len(o.group)) if rank != o.me]
            send = [(rank, intersect(o.have[o.me], o.wants(rank, j))) for rank in others]
            recv = [(rank, intersect(o.have[rank], o.wants(o.me, j))) for rank in others]
            self._plans[self._panel(j)] = _filled(send), _filled(recv)
        return self._plans[self._panel(j)]

    def _space(self, j: int) -> Space:
        """Return the memory for panel j: two of them take turns."""
        space = self._spaces.setdefault(self._panel(j) % 2, Space())
        space.reset()
        return space


def _filled(boxes: Sequence[tuple[int, Box]]) -> list[tuple[int, Box]]:
    return [(rank, box) for rank, box in boxes if 0 not in box_shape(box)]


KEPT = 1 << 28
"""Bytes of memory for pieces that are kept for a grid; what was used longest ago goes first."""


def kept(grid: Grid, key: Hashable) -> dict[int, Space]:
    """Return the memory that products of one kind have used on a grid, to be used again."""
    used, spaces = SPACES.get(grid, key, dict), SPACES.of(grid)
    while len(spaces) > 1 and sum(map(_bytes, spaces.values())) > KEPT:
        spaces.popitem(last=False)
    return used


def _bytes(kind: Mapping[int, Space]) -> int:
    return sum(space.nbytes for space in kind.values())


class Space:
    """Memory that is given out block by block, and the same again the next time."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._next = 0
        self.nbytes = 0
        """The bytes that it holds."""

    def reset(self) -> None:
        """Start to give out the same memory again."""
        self._next = 0

    def take(self, shape: Sequence[int], beside: Block) -> Block:
        """Return an uninitialised block of the library and dtype of `beside`."""
        count, i = math.prod(shape), self._next
        self._next += 1
        if i == len(self._blocks):
            self._blocks.append(backend.empty_like(beside, (0,)))
        more = count - self._blocks[i].shape[0]
        if more > 0:
            self._blocks[i] = backend.empty_like(beside, (count,))
            self.nbytes += more * backend.numpy_dtype(beside.dtype).itemsize
        return backend.namespace(beside).reshape(self._blocks[i][:count], tuple(shape))

    def pack(self, piece: Block) -> Block:
        """Return a piece as one stretch of memory, copied only if it is none."""
        if not hasattr(piece, "flags") or piece.flags.c_contiguous:
            return piece
        packed = self.take(piece.shape, piece)
        packed[...] = piece
        return packed


_PLANS = GridCache[Hashable, dict[int, tuple[list[tuple[int, Box]], list[tuple[int, Box]]]]](limit=1024)
"""For each kind of operand and each of its panels: the boxes that go to other ranks, and those that come from them."""
SPACES = GridCache[Hashable, dict[int, Space]](limit=64)
"""For each kind of streamed product: the memory of its pieces."""
