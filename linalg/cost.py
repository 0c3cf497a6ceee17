"""What a product costs on a grid, before it is done: words, messages, flop, memory, and the bounds no algorithm beats.

Everything here is arithmetic on sizes; nothing needs MPI. Words are those of the ledger, to the word.

References
----------
Al Daas, Ballard, Grigori, Kumar, Rouse: Tight memory-independent parallel matrix multiplication communication lower
bounds, SPAA 2022. Smith, Lowery, Langou, van de Geijn: A tight I/O lower bound for matrix multiplication, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colossal_mpi.errors import ShapeError
from colossal_mpi.layout import Layout, box_shape, coords_of
from colossal_mpi.linalg.subscripts import map_layout, parse
from colossal_mpi.redistribute import received


@dataclass(frozen=True)
class Cost:
    """The cost of one product on one map, moves included."""

    words: tuple[int, ...]
    """Array elements that each rank receives."""
    messages: int
    """Messages that a rank receives, at most: log2 p for each reduction or gathering over p ranks."""
    flop: int
    """Floating-point operations of the busiest rank; 2mnk in all."""
    workspace: int
    """Array elements that a rank holds besides the stored operands and result, at most."""

    @property
    def total_words(self) -> int:
        """Words received by all ranks together."""
        return sum(self.words)


def price(
    subscripts: str,
    extents: Mapping[str, int],
    sizes: Mapping[str, int],
    axes: Mapping[str, str],
    a: Layout,
    b: Layout,
    out: Layout | None = None,
) -> Cost:
    """Return the cost of ``contract(subscripts, a, b, axes, out)``, the moves of badly stored operands included.

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
    """
    sub = parse(subscripts)
    axes = {axis: letter for axis, letter in axes.items() if sizes[axis] > 1}
    made = map_layout(sub.c, axes, sub.k)
    moves = [
        (sub.a, a.on(sizes, len(sub.a)), map_layout(sub.a, axes)),
        (sub.b, b.on(sizes, len(sub.b)), map_layout(sub.b, axes)),
        (sub.c, made, made if out is None else out.on(sizes, len(sub.c))),
    ]
    steps = [received(tuple(extents[x] for x in s), have, want, sizes) for s, have, want in moves]
    workspace = sum(_largest(s, lay, extents, sizes) for s, have, want, lay in _held(moves) if have != want)
    return Cost(
        tuple(sum(words) for words in zip(*steps, strict=True)),
        sum(_messages(have, want, sizes) for _, have, want in moves),
        2 * math.prod(-(-n // _parts(x, axes, sizes)) for x, n in extents.items()),
        workspace,
    )


def _held(moves: Sequence[tuple[str, Layout, Layout]]) -> list[tuple[str, Layout, Layout, Layout]]:
    """Return each move with the layout that is neither operand nor result: gathered a and b, partial c."""
    a, b, c = moves
    return [(*a, a[2]), (*b, b[2]), (*c, c[1])]


def _parts(letter: str, axes: Mapping[str, str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis, mapped in axes.items() if mapped == letter)


def _largest(letters: str, layout: Layout, extents: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return the elements of the largest block, which is that of rank 0: earlier parts are never smaller."""
    box = layout.box([extents[x] for x in letters], sizes, coords_of(0, sizes))
    return math.prod(box_shape(box))


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


def lower_bound(m: int, n: int, k: int, ranks: int) -> float:
    """Return the words that some rank must receive in an m x n x k product, whatever memory it has.

    Al Daas et al. 2022, theorem 3, for data that is stored once and evenly. With the sizes in order, largest first:
    one dimension is cut up to p = m/n ranks, two up to mn/k^2, three beyond.
    """
    m, n, k = sorted((m, n, k), reverse=True)
    if ranks <= m / n:
        touched = (m * n + m * k) / ranks + n * k
    elif ranks <= m * n / k**2:
        touched = 2 * math.sqrt(m * n * k**2 / ranks) + m * n / ranks
    else:
        touched = 3 * (m * n * k / ranks) ** (2 / 3)
    return max(0.0, touched - (m * n + m * k + n * k) / ranks)


def memory_bound(m: int, n: int, k: int, ranks: int, memory: float) -> float:
    """Return the words that some rank with `memory` words must receive: ``2mnk / (p sqrt(memory)) - 2 memory``."""
    return max(0.0, 2 * m * n * k / (ranks * math.sqrt(memory)) - 2 * memory)


@dataclass(frozen=True)
class GridChoice:
    """A grid for a product and what it costs. Ranks beyond the grid stay idle."""

    sizes: Mapping[str, int]
    axes: Mapping[str, str]
    words: float
    """Received by the busiest rank."""
    bound: float
    """`lower_bound` for all the ranks that there are."""
    flop: int
    """Of the busiest rank."""
    memory: int
    """Elements that a rank holds at most: operands, result and workspace."""

    @property
    def ranks(self) -> int:
        """The ranks that work."""
        return math.prod(self.sizes.values())


BALANCE = 50.0
"""Flop that take as long as receiving one word, when nothing has been measured."""


def best_grid(m: int, n: int, k: int, ranks: int, memory: int | None = None, balance: float = BALANCE) -> GridChoice:
    """Return the grid row x col x depth, mapped to m, n and k, on which a product takes the least time.

    Parameters
    ----------
    m, n, k : int
    ranks : int
        Ranks that there are; some may be left idle: for 20000^3 on 127 ranks, 5 x 5 x 5 moves ten times fewer words
        than 127 x 1 x 1.
    memory : int, optional
        Elements that a rank can hold.
    balance : float
        Flop that take as long as receiving one word.

    Returns
    -------
    GridChoice
        Time is modelled as ``flop + balance * words`` of the busiest rank. Ties go against cutting k, which adds and
        writes C once more, and then to fewer ranks.

    Raises
    ------
    ShapeError
        If no grid fits the memory.
    """
    choices = [_choice(m, n, k, ranks, p) for p in _grids(ranks)]
    fitting = [choice for choice in choices if memory is None or choice.memory <= memory]
    if not fitting:
        least = min(choices, key=lambda choice: choice.memory)
        raise ShapeError(
            f"best_grid: {m} x {n} x {k} on {ranks} ranks needs at least {least.memory:,} elements on a rank "
            f"({dict(least.sizes)}) and memory is {memory:,}: use more ranks"
        )
    return min(fitting, key=lambda c: (c.flop + balance * c.words, c.sizes["depth"], c.ranks))


def _grids(ranks: int) -> list[tuple[int, int, int]]:
    return [
        (pm, pn, pk)
        for pm in range(1, ranks + 1)
        for pn in range(1, ranks // pm + 1)
        for pk in range(1, ranks // (pm * pn) + 1)
    ]


def _choice(m: int, n: int, k: int, ranks: int, p: tuple[int, int, int]) -> GridChoice:
    (pm, pn, pk), (lm, ln, lk) = p, (-(-size // parts) for size, parts in zip((m, n, k), p, strict=True))
    faces = ((lm * lk, pn), (lk * ln, pm), (lm * ln, pk))
    stored = sum(face / copies for face, copies in faces)
    sizes = {"row": pm, "col": pn, "depth": pk}
    workspace = sum(face for face, copies in faces if copies > 1)
    return GridChoice(
        sizes,
        {"row": "m", "col": "n", "depth": "k"},
        sum(face * (1 - 1 / copies) for face, copies in faces),
        lower_bound(m, n, k, ranks),
        2 * lm * ln * lk,
        math.ceil(stored) + workspace,
    )
