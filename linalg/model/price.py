"""What a product costs on a grid, before it is done: words, messages, flop and memory.

Everything here is arithmetic on sizes; nothing needs MPI. Words are those of the ledger, to the word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from colossal_mpi.errors import GridError, LayoutError, ShapeError
from colossal_mpi.layout import Layout, bounds, box_shape, coords_of, part
from colossal_mpi.linalg.contraction.subscripts import Subscripts, map_layout, parse
from colossal_mpi.redistribution import received, stages


@dataclass(frozen=True)
class Cost:
    """The cost of one product on one map, moves included."""

    words: tuple[int, ...]
    """Array elements that each rank receives."""
    messages: int
    """Messages that a rank receives, at most: log2 p for each reduction or gathering over p ranks, of each panel."""
    flop: int
    """Floating-point operations of the busiest rank; 2mnk in all."""
    summed: int
    """Array elements that a rank adds up in reductions, at most."""
    workspace: int
    """Array elements that a rank holds besides the stored operands and result, at most: gathered or received pieces of
    the operands, partial sums and what is packed for sending. What lies on one node and is read in place takes less."""

    @property
    def total_words(self) -> int:
        """Words received by all ranks together."""
        return sum(self.words)


@dataclass(frozen=True)
class _Move:
    """From where to where one of the three arrays goes."""

    letters: str
    shape: tuple[int, ...]
    have: Layout
    want: Layout
    operand: bool


@dataclass(frozen=True)
class _Panels:
    """The panels of a streamed product: their letter, how many, and the longest."""

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
) -> Cost:
    """Return the cost of ``contract(subscripts, a, b, axes, out, ...)``, the moves of badly stored operands included.

    Parameters
    ----------
    subscripts : str
    extents : mapping of str to int
        Size of each letter.
    sizes : mapping of str to int
        The axes of the grid.
    axes : mapping of str to str
        Grid axis to letter.
    a, b : Layout
        In which the operands are stored.
    out : Layout, optional
        Of the result; None leaves it partial.
    stream, panel
        As in `contract`.

    Raises
    ------
    ShapeError, GridError, LayoutError
        If extents, sizes, map or stream do not fit the subscripts.
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
    return Cost(
        tuple(map(sum, zip(*words, strict=True))),
        sum(_messages(m.have, m.want, sizes) * _times(m, panels) for m in moves),
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
    """Return how often an array is communicated: once a panel if it has their letter and is not reduced whole."""
    in_panels = panels.letter in move.letters and (move.operand or _scatters(move))
    return panels.count if in_panels else 1


def _summed(move: _Move, sizes: Mapping[str, int]) -> int:
    """Return the elements that rank 0, whose blocks are never smaller than another's, adds to its own."""
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
    """Return what a rank holds of one of the three arrays besides what is stored, at most."""
    if move.have == move.want:
        return 0
    scattered, middle, rest = stages(move.have, move.want)
    block = partial(_block, move, sizes=sizes)
    reduced = 3 * block(middle) if scattered or rest else 0  # received, added, the sum before
    if move.operand:
        # What arrives and what is packed are together no more than the piece of the gathered operand, twice if the
        # next panel is under way.
        gathered = block(move.want, panels=panels) * (2 if _times(move, panels) > 1 else 1)
        return gathered + (reduced + block(move.have) if reduced else 0)
    in_panels = panels if _times(move, panels) > 1 else None
    summed = 2 * block(move.have, panels=in_panels) if reduced else block(move.have)  # the sums, and packed
    moved = block(middle) + 2 * block(move.want) if middle.dims != move.want.dims else 0
    return summed + (3 * block(middle, panels=in_panels) if reduced else 0) + moved


def _parts(letter: str, axes: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis, mapped in axes.items() if mapped == letter)


def _messages(have: Layout, want: Layout, sizes: Mapping[str, int]) -> int:
    reduced = math.prod(sizes[axis] for axis in have.partial if axis not in want.partial)
    moved = math.prod(sizes[axis] for axis in have.cut if have.dims != want.dims and axis not in _kept(have, want))
    return math.ceil(math.log2(reduced)) + math.ceil(math.log2(moved))


def _kept(have: Layout, want: Layout) -> list[str]:
    """Return the axes that cut the same outermost piece of the same dim before and after."""
    kept = []
    for old, new in zip(have.dims, want.dims, strict=True):
        for x, y in zip(old, new, strict=False):
            if x != y:
                break
            kept.append(x)
    return kept
