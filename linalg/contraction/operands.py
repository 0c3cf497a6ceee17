"""The operands of a product: the tiles of them that a rank needs, and the sources of these tiles.

A product is done in panels of one letter, or as a single panel. The part of a panel that one rank stores is a tile.
Tiles are not copied side by side: every pair of tiles that meet is multiplied where it is, into its part of the
result. An operand that is in place, or that a neighbour on the same node stores, is therefore never copied.

`contract` constructs the operands and ``execute`` gets their tiles. Tiles come from this rank's own block (`InPlace`),
from the shared memory of the node (`SharedMemory`) or by message (`Messages`).
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

Plan = tuple[list[tuple[int, Box]], list[tuple[int, Box]]]
"""The boxes to send and to receive, each with the other rank."""
Tile = tuple[Box, Block]
"""A part of an operand: its box of global indices and the block of memory that holds it."""


@dataclass(frozen=True)
class Panels:
    """The division of every rank's local range of one letter into the same number of parts; one part by default.

    Parameters
    ----------
    letter : str
        The streamed letter; empty if the product is done whole.
    extent : int
        The global size of the letter.
    axes : tuple of str
        The grid axes that are mapped to the letter, outer to inner.
    count : int
        The number of panels, the same on all ranks.
    """

    letter: str = ""
    extent: int = 0
    axes: Axes = ()
    count: int = 1

    @classmethod
    def of(cls, letter: str, extent: int, axes: Axes, grid: Grid, width: int) -> Panels:
        """Return panels of at most `width` indices of a letter."""
        low, high = bounds(extent, axes, grid.axes, dict.fromkeys(axes, 0))
        return cls(letter, extent, axes, max(1, -(-(high - low) // width)))

    def cuts(self, letters: str) -> bool:
        """Return whether an array of these letters is divided into panels."""
        return bool(self.letter) and self.letter in letters

    def cut(self, letters: str, box: Box, j: int, grid: Grid, coords: Mapping[str, int]) -> Box:
        """Return the part of `box`, of dims `letters`, that belongs to panel j of the rank at `coords`."""
        if not self.cuts(letters):
            return box
        low, high = bounds(self.extent, self.axes, grid.axes, coords)
        start, stop = part(high - low, self.count, j)
        dim = letters.index(self.letter)
        panel = ((low + start, low + stop),)
        return (*box[:dim], *intersect(box[dim : dim + 1], panel), *box[dim + 1 :])


@dataclass
class Operand:
    """One operand of a product: how it is stored, which layout the map asks for, and which ranks exchange its tiles.

    Parameters
    ----------
    letters : str
        A letter for each dim.
    array : DistArray
        The operand as it is stored, without partial sums.
    wanted : Layout
        The layout that the map asks for.
    panels : Panels
        The panels of the product.
    side : {"a", "b"}
        The operand's side in the product.
    redundant : bool
        Whether it is cut over an axis that the map leaves out, so that several ranks compute the same product.
    """

    letters: str
    array: DistArray
    wanted: Layout
    panels: Panels
    side: str
    redundant: bool = False

    def __post_init__(self) -> None:
        array, grid = self.array, self.array.grid
        self.axes = moved_axes(array.layout, self.wanted, grid)
        self.group = group_coords(self.axes, grid)
        self.me = grid.comm(self.axes).rank if self.axes else 0
        self.stored = [array.layout.box(array.shape, grid.axes, at) for at in self.group]
        self.needed = [self.wanted.box(array.shape, grid.axes, at) for at in self.group]

    @property
    def large(self) -> bool:
        """True if its blocks are so large that multiplying tile by tile is quicker; the same on all ranks."""
        array = self.array
        stored = math.prod(box_shape(array.layout.box(array.shape, array.grid.axes, self.first)))
        large = stored * backend.numpy_dtype(array.dtype).itemsize >= redistribution.READ_FROM
        return large and array.layout != self.wanted

    @property
    def first(self) -> dict[str, int]:
        """The coordinates of rank 0, whose blocks are at least as large as any other rank's."""
        return dict.fromkeys(self.array.grid.axes, 0)

    @property
    def largest(self) -> int:
        """The greatest number of elements that any rank needs."""
        return math.prod(box_shape(self.wanted.box(self.array.shape, self.array.grid.axes, self.first)))

    def parts(self, letters: str) -> int:
        """Return the number of parts into which the ranks that store the needed elements cut `letters`."""
        dims = zip(self.letters, self.array.layout.dims, strict=True)
        return self.array.grid.extent([axis for x, cut in dims if x in letters for axis in cut if axis in self.axes])

    def moved(self) -> Operand:
        """Return the operand in the layout that the map asks for."""
        if self.array.layout == self.wanted:
            return self
        # A[stored layout] -> A[wanted layout]: redistribute
        array = self.array.redistribute(self.wanted)
        return Operand(self.letters, array, self.wanted, self.panels, self.side, self.redundant)

    @property
    def streams(self) -> bool:
        """True if the operand has the letter of the panels."""
        return self.panels.cuts(self.letters)

    def needs(self, rank: int, j: int) -> Box:
        """Return the box that a rank of the group needs for panel j."""
        return self.panels.cut(self.letters, self.needed[rank], j, self.array.grid, self.group[rank])

    def own(self, j: int) -> list[Tile]:
        """Return the tile of panel j that this rank stores, or none."""
        return self.tile(self.me, self.array.local, j)

    def tile(self, rank: int, block: Block, j: int) -> list[Tile]:
        """Return the tile of panel j that a rank of the group stores in `block`, or none."""
        box = intersect(self.stored[rank], self.needs(self.me, j))
        return [] if 0 in box_shape(box) else [(box, block[slices(box, self.stored[rank])])]


def open_source(operand: Operand, stack: ExitStack, keep: bool) -> InPlace:
    """Return the cheapest source of an operand's tiles; all ranks of its group choose the same.

    Parameters
    ----------
    operand : Operand
        The operand.
    stack : ExitStack
        A stack that is closed at the end of the product, which releases shared memory.
    keep : bool
        Whether receive buffers are kept for the next product of this kind. Blocks outside shared memory are then
        not copied into it, because that would take memory that the cost model does not count.
    """
    array, axes = operand.array, operand.axes
    if not axes:
        return InPlace(operand)
    shapes = [box_shape(box) for box in operand.stored]
    if readable(array.local, shapes, array.grid, axes):
        needed, own = operand.needed[operand.me], operand.stored[operand.me]
        words = math.prod(box_shape(needed)) - math.prod(box_shape(intersect(needed, own)))
        # A[M_axes] -> A[M]: allgather over the axes by reading the blocks of the node's ranks
        blocks = stack.enter_context(reading(array.local, array.grid, axes, shapes, words, lend=not keep, leaf=False))
        if blocks is not None:
            return SharedMemory(operand, blocks)
    return Messages(operand, keep)


class InPlace:
    """The tiles of an operand of which every rank stores all that it needs."""

    def __init__(self, operand: Operand) -> None:
        self._operand = operand

    def post(self, j: int) -> None:
        """Begin to move panel j."""

    def tiles(self, j: int) -> list[Tile]:
        """Return the tiles of panel j; wait for them if they are under way."""
        return self._operand.own(j)


class SharedMemory(InPlace):
    """The tiles of an operand, read where the ranks of the node store them."""

    def __init__(self, operand: Operand, blocks: Sequence[Block]) -> None:
        super().__init__(operand)
        self._blocks = blocks

    def tiles(self, j: int) -> list[Tile]:
        """Return the tiles of panel j, in the same order on all ranks, so that equal products have equal bits."""
        return [tile for rank, block in enumerate(self._blocks) for tile in self._operand.tile(rank, block, j)]


class Messages(InPlace):
    """The tiles of an operand, received by message; the next panel's are under way while a panel is multiplied."""

    def __init__(self, operand: Operand, keep: bool) -> None:
        super().__init__(operand)
        grid, array = operand.array.grid, operand.array
        key = ("tiles", operand.side, operand.letters, array.shape, array.layout, operand.wanted, operand.panels)
        self._plans = _PLANS.get(grid, key, dict)
        self._spaces = workspaces(grid, (*key, type(array.local), str(array.dtype))) if keep else {}
        self._pending: dict[int, tuple[Pending, list[Tile]]] = {}
        self._whole: list[Tile] | None = None

    def _panel(self, j: int) -> int:
        """Return the panel to move for panel j: an operand without the streamed letter moves whole, once."""
        return j if self._operand.streams else 0

    def post(self, j: int) -> None:
        """Send the tiles of panel j to the ranks that need them and post the receives."""
        if self._whole is not None or self._panel(j) in self._pending:
            return
        operand, grid = self._operand, self._operand.array.grid
        send, recv = self._plan(j)
        origin, packed, space = operand.stored[operand.me], {}, self._space(j)
        for _, box in send:
            if box not in packed:
                packed[box] = space.pack(operand.array.local[slices(box, origin)])
        landing = [(source, box, space.take(box_shape(box), operand.array.local)) for source, box in recv]
        sent = [(to, packed[box]) for to, box in send]
        # panel j of A[M_axes] -> panel j of A[M]: allgather over the axes, a message from each rank to each
        pending = start_exchange(grid, operand.axes, sent, [(source, block) for source, _, block in landing])
        self._pending[self._panel(j)] = pending, [(box, block) for _, box, block in landing]

    def tiles(self, j: int) -> list[Tile]:
        """Return the tiles of panel j, in the same order on all ranks, so that equal products have equal bits."""
        if self._whole is not None:
            return self._whole
        self.post(j)
        pending, received = self._pending.pop(self._panel(j))
        pending.wait()
        own = self._operand.own(j)
        if self._operand.redundant:
            # Received tiles are contiguous. The own tile must be, too: BLAS may round differently with other strides.
            own = [(box, backend.namespace(block).asarray(block, copy=True)) for box, block in own]
        tiles = sorted(own + received, key=lambda tile: tile[0])
        if not self._operand.streams:
            self._whole = tiles
        return tiles

    def _plan(self, j: int) -> Plan:
        """Return the boxes of panel j that this rank sends and receives, each with the other rank."""
        if self._panel(j) not in self._plans:
            o = self._operand
            others = [rank for rank in range(len(o.group)) if rank != o.me]
            send = [(rank, intersect(o.stored[o.me], o.needs(rank, j))) for rank in others]
            recv = [(rank, intersect(o.stored[rank], o.needs(o.me, j))) for rank in others]
            self._plans[self._panel(j)] = _filled(send), _filled(recv)
        return self._plans[self._panel(j)]

    def _space(self, j: int) -> Workspace:
        """Return the buffers for panel j; two workspaces take turns."""
        space = self._spaces.setdefault(self._panel(j) % 2, Workspace())
        space.reset()
        return space


def _filled(boxes: Sequence[tuple[int, Box]]) -> list[tuple[int, Box]]:
    return [(rank, box) for rank, box in boxes if 0 not in box_shape(box)]


KEPT = 1 << 28
"""Bytes of buffers that are kept for a grid; the least recently used are dropped first."""


def workspaces(grid: Grid, key: Hashable) -> dict[int, Workspace]:
    """Return the buffers that earlier products of the same kind used on a grid."""
    used, spaces = WORKSPACES.get(grid, key, dict), WORKSPACES.of(grid)
    while len(spaces) > 1 and sum(map(_bytes, spaces.values())) > KEPT:
        spaces.popitem(last=False)
    return used


def _bytes(kind: Mapping[int, Workspace]) -> int:
    return sum(space.nbytes for space in kind.values())


class Workspace:
    """Buffers that are handed out in order, and the same buffers again after `reset`."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._next = 0
        self.nbytes = 0
        """Bytes of all buffers."""

    def reset(self) -> None:
        """Hand out the same buffers again from the first."""
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

    def pack(self, tile: Block) -> Block:
        """Return a tile in contiguous memory, copied into a buffer only if it is not contiguous."""
        if not hasattr(tile, "flags") or tile.flags.c_contiguous:
            return tile
        packed = self.take(tile.shape, tile)
        packed[...] = tile
        return packed


_PLANS = GridCache[Hashable, dict[int, Plan]](limit=1024)
"""The plan of each panel, for each kind of operand."""
WORKSPACES = GridCache[Hashable, dict[int, Workspace]](limit=64)
"""The buffers of its tiles, for each kind of streamed product."""
