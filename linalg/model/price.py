"""The price of a product on a grid: words, messages, flop, memory and, on a machine, seconds.

`options` prices every map with it. All of it is arithmetic on sizes and layouts, and nothing needs MPI; it asks
``redistribution`` for the words of each move, so that they are exactly the words that the ledger counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from colossal_mpi.errors import GridError, LayoutError, ShapeError
from colossal_mpi.layout import Layout, bounds, box_shape, coords_of, part
from colossal_mpi.linalg.contraction.subscripts import Subscripts, map_layout, parse
from colossal_mpi.machine import Link, Machine
from colossal_mpi.redistribution import received, stages


@dataclass(frozen=True)
class Traffic:
    """The move of one of the three arrays of a product from one layout to another.

    Parameters
    ----------
    axes : tuple of str
        The grid axes that it moves over.
    words : tuple of int
        Array elements that each rank receives.
    messages : int
        Messages that a rank receives at most, counted as log2 of the number of ranks of a collective.
    """

    axes: tuple[str, ...]
    words: tuple[int, ...]
    messages: int


@dataclass(frozen=True)
class Price:
    """The price of one product on one map, with the moves of its operands and its result.

    Parameters
    ----------
    sizes : mapping of str to int
        The axes of the grid and their sizes.
    traffic : tuple of Traffic
        The moves of A, B and C.
    flop : int
        Flop of the busiest rank; 2mnk of all ranks together.
    summed : int
        Array elements that a rank adds in reductions, at most.
    workspace : int
        Array elements that a rank holds besides the stored operands and the stored result, at most: gathered or
        received blocks of the operands, partial sums and packed messages. Blocks that lie on one node and are read in
        place take less.
    """

    sizes: Mapping[str, int]
    traffic: tuple[Traffic, ...]
    flop: int
    summed: int
    workspace: int

    @property
    def words(self) -> tuple[int, ...]:
        """Array elements that each rank receives."""
        return tuple(map(sum, zip(*(move.words for move in self.traffic), strict=True)))

    @property
    def total_words(self) -> int:
        """Array elements that all ranks receive together."""
        return sum(self.words)

    @property
    def messages(self) -> int:
        """Messages that a rank receives, at most: log2 p for each reduction or gather over p ranks, for each panel."""
        return sum(move.messages for move in self.traffic)

    def seconds(self, machine: Machine, itemsize: int) -> float:
        """Return the time of the product on a machine, as the busiest rank takes it.

        Parameters
        ----------
        machine : Machine
            Its rates and links.
        itemsize : int
            Bytes of an array element.

        Returns
        -------
        float
            Seconds: ``latency messages + words itemsize / bandwidth`` on each link, ``flop / flops``, and
            ``3 summed itemsize / memory``, since an addition reads twice and writes once.
        """
        first = coords_of(0, self.sizes)
        links: dict[Link, list[Traffic]] = {}
        for move in self.traffic:
            links.setdefault(machine.link(move.axes, self.sizes, first), []).append(move)
        moving = 0.0
        for link, moves in links.items():
            busiest = max(map(sum, zip(*(move.words for move in moves), strict=True)))
            moving += link.latency * sum(move.messages for move in moves) + busiest * itemsize / link.bandwidth
        return moving + self.flop / machine.flops + 3 * self.summed * itemsize / machine.memory


@dataclass(frozen=True)
class _Move:
    """The layouts that one of the three arrays has and wants, with its letters and its global shape."""

    letters: str
    shape: tuple[int, ...]
    have: Layout
    want: Layout
    operand: bool


@dataclass(frozen=True)
class _Panels:
    """The panels of a streamed product: their letter, their number, and the width of the widest."""

    letter: str = ""
    count: int = 1
    width: int = 0


def price(
    subscripts: str,
    extents: Mapping[str, int],
    sizes: Mapping[str, int],
    axes: Mapping[str, str],
    a: Layout,
    b: Layout,
    out: Layout | None = None,
    stream: str | None = None,
    panel: int = 256,
) -> Price:
    """Return the price of ``contract(subscripts, a, b, axes, out, ...)``, the moves to and from its map included.

    Parameters
    ----------
    subscripts : str
        The product, such as ``"mk,kn->mn"``.
    extents : mapping of str to int
        Global size of each letter.
    sizes : mapping of str to int
        The axes of the grid and their sizes.
    axes : mapping of str to str
        The map: the letter that each axis cuts.
    a, b : Layout
        Layouts in which the operands are stored.
    out : Layout, optional
        Layout of the result; None leaves it partial.
    stream : str, optional
        The letter in whose panels the product is done, as in `contract`; by default it is done whole.
    panel : int
        Width of a panel.

    Returns
    -------
    Price
        Words, messages, flop and workspace of a rank.

    Raises
    ------
    ShapeError
        If the extent of a letter is missing or a panel has no width.
    GridError
        If the map has an axis that the sizes lack.
    LayoutError
        If the map or the stream has a letter that the subscripts lack.

    Examples
    --------
    >>> layout = Layout("row", "col")
    >>> linalg.price("mk,kn->mn", {"m": 8, "n": 8, "k": 8}, {"row": 2, "col": 2}, {"row": "m", "col": "n"},
    ...              layout, layout, layout).words
    (32, 32, 32, 32)
    """
    sub = parse(subscripts)
    _check(sub, extents, sizes, axes, stream, panel)
    axes = {axis: letter for axis, letter in axes.items() if sizes[axis] > 1}
    made = map_layout(sub.c, axes, sub.k)

    arrays = (
        (sub.a, a.on(sizes, len(sub.a)), map_layout(sub.a, axes), True),
        (sub.b, b.on(sizes, len(sub.b)), map_layout(sub.b, axes), True),
        (sub.c, made, made if out is None else out.on(sizes, len(sub.c)), False),
    )
    moves = [_Move(x, tuple(extents[y] for y in x), have, want, operand) for x, have, want, operand in arrays]
    panels = _panels(extents, sizes, axes, stream, panel)
    words = [received(m.shape, m.have, m.want, sizes) for m in moves]
    traffic = tuple(
        Traffic(_moved_over(m.have, m.want), tuple(w), _messages(m.have, m.want, sizes) * _times(m, panels))
        for m, w in zip(moves, words, strict=True)
    )
    return Price(
        dict(sizes),
        traffic,
        2 * math.prod(-(-n // _parts(x, axes, sizes)) for x, n in extents.items()),
        sum(_summed(m, sizes) for m in moves),
        sum(_workspace(m, panels, sizes) for m in moves),
    )


def _check(
    sub: Subscripts,
    extents: Mapping[str, int],
    sizes: Mapping[str, int],
    axes: Mapping[str, str],
    stream: str | None,
    panel: int,
) -> None:
    letters = list(dict.fromkeys(sub.a + sub.b))
    missing = [x for x in letters if x not in extents]
    if missing:
        raise ShapeError(f"price({sub}): no extent of {', '.join(missing)}; give one for each of {', '.join(letters)}")
    alien = [axis for axis in axes if axis not in sizes]
    if alien:
        raise GridError(f"price({sub}): no axis {', '.join(alien)}; the sizes name {', '.join(sizes) or 'none'}")
    wrong = [x for x in [*axes.values(), *([stream] if stream else [])] if x not in letters]
    if wrong:
        raise LayoutError(f"price({sub}): {', '.join(wrong)} is no letter of it; use {', '.join(letters)}")
    if stream and panel < 1:
        raise ShapeError(f"price({sub}): panel={panel}: a panel has at least one index")


def _panels(
    extents: Mapping[str, int], sizes: Mapping[str, int], axes: Mapping[str, str], stream: str | None, panel: int
) -> _Panels:
    if stream is None:
        return _Panels()
    mapped = tuple(axis for axis, letter in axes.items() if letter == stream)
    _, length = bounds(extents[stream], mapped, sizes, dict.fromkeys(mapped, 0))
    count = max(1, -(-length // panel))
    return _Panels(stream, count, part(length, count, 0)[1])


def _scatters(move: _Move) -> bool:
    return bool(stages(move.have, move.want)[0])


def _times(move: _Move, panels: _Panels) -> int:
    """Return how often an array is moved: once for each panel if it has the panels' letter and is not reduced whole."""
    in_panels = panels.letter in move.letters and (move.operand or _scatters(move))
    return panels.count if in_panels else 1


def _summed(move: _Move, sizes: Mapping[str, int]) -> int:
    """Return the elements that rank 0, which has the largest blocks, adds to its own in reductions."""
    scattered, middle, rest = stages(move.have, move.want)
    p, q = (math.prod(sizes[axis] for axis in axes) for axes in (scattered, rest))
    own = _block(move, middle, sizes)
    return (p - 1) * own + (q - 1) * -(-own // q)


def _block(move: _Move, layout: Layout, sizes: Mapping[str, int], panels: _Panels | None = None) -> int:
    """Return the elements of the largest block in a layout, or of its part in one panel."""
    shape = box_shape(layout.box(move.shape, sizes, coords_of(0, sizes)))
    if panels is not None and panels.letter and panels.letter in move.letters:
        at = move.letters.index(panels.letter)
        shape = (*shape[:at], min(shape[at], panels.width), *shape[at + 1 :])
    return math.prod(shape)


def _workspace(move: _Move, panels: _Panels, sizes: Mapping[str, int]) -> int:
    """Return the elements of one of the three arrays that a rank holds besides its stored block, at most."""
    if move.have == move.want:
        return 0
    scattered, middle, rest = stages(move.have, move.want)
    block = partial(_block, move, sizes=sizes)
    reduced = 3 * block(middle) if scattered or rest else 0  # the received block, the sum, and the sum before
    if move.operand:
        # Received and packed elements together are no more than the gathered panel, twice if the next panel is under
        # way.
        gathered = block(move.want, panels=panels) * (2 if _times(move, panels) > 1 else 1)
        return gathered + (reduced + block(move.have) if reduced else 0)
    in_panels = panels if _times(move, panels) > 1 else None
    summed = 2 * block(move.have, panels=in_panels) if reduced else block(move.have)  # the sums, and packed
    moved = block(middle) + 2 * block(move.want) if middle.dims != move.want.dims else 0
    return summed + (3 * block(middle, panels=in_panels) if reduced else 0) + moved


def _parts(letter: str, axes: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis, mapped in axes.items() if mapped == letter)


def _moved_over(have: Layout, want: Layout) -> tuple[str, ...]:
    """Return the axes over which an array moves: the axes of its reduction, and the axes that change their place."""
    reduced = [axis for axis in have.partial if axis not in want.partial]
    changed = [axis for axis in (*have.cut, *want.cut) if have.dims != want.dims and axis not in _kept(have, want)]
    return tuple(dict.fromkeys((*reduced, *changed)))


def _messages(have: Layout, want: Layout, sizes: Mapping[str, int]) -> int:
    reduced = math.prod(sizes[axis] for axis in have.partial if axis not in want.partial)
    moved = math.prod(sizes[axis] for axis in have.cut if have.dims != want.dims and axis not in _kept(have, want))
    return math.ceil(math.log2(reduced)) + math.ceil(math.log2(moved))


def _kept(have: Layout, want: Layout) -> list[str]:
    """Return the axes that cut a dim outermost and in the same order before and after."""
    kept = []
    for old, new in zip(have.dims, want.dims, strict=True):
        for x, y in zip(old, new, strict=False):
            if x != y:
                break
            kept.append(x)
    return kept
