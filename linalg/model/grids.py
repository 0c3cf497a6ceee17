"""Choose a grid for a product from nothing but sizes; ranks may be left idle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from colossal_mpi.errors import ShapeError
from colossal_mpi.linalg.model.bounds import lower_bound


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
    if min(m, n, k) < 0 or ranks < 1:
        raise ShapeError(f"best_grid({m}, {n}, {k}, ranks={ranks}): sizes are 0 or more, and ranks 1 or more")
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
