"""The best grid for a product, from its sizes alone; some ranks may stay idle.

Users and the benchmark of products call `best_grid` before they make a `Grid`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from colossal_mpi.errors import ShapeError
from colossal_mpi.linalg.model.bounds import lower_bound
from colossal_mpi.machine import TYPICAL, Machine

_ITEMSIZE = 8
"""Bytes of a word."""


@dataclass(frozen=True)
class GridChoice:
    """A grid for a product, and the price of the product on it. Ranks beyond the grid stay idle.

    Parameters
    ----------
    sizes : mapping of str to int
        Size of each axis: ``row``, ``col`` and ``depth``.
    axes : mapping of str to str
        The letter (m, n or k) that each axis cuts.
    words : float
        Words (array elements) that the busiest rank receives.
    bound : float
        The `lower_bound` for all available ranks, in words.
    flop : int
        Flop of the busiest rank.
    memory : int
        Array elements that a rank holds at most: operands, result and workspace.
    """

    sizes: Mapping[str, int]
    axes: Mapping[str, str]
    words: float
    bound: float
    flop: int
    memory: int

    @property
    def ranks(self) -> int:
        """Number of ranks that work."""
        return math.prod(self.sizes.values())


def best_grid(m: int, n: int, k: int, ranks: int, memory: int | None = None, machine: Machine = TYPICAL) -> GridChoice:
    """Return the grid row x col x depth, mapped to m, n and k, on which a product takes the least time.

    Parameters
    ----------
    m, n, k : int
        Global sizes of the product.
    ranks : int
        The available ranks. Some may stay idle: for 20000^3 on 127 ranks, 5 x 5 x 5 moves ten times fewer words than
        127 x 1 x 1.
    memory : int, optional
        Array elements that a rank can hold; by default there is no limit.
    machine : Machine
        The machine that computes and moves words of 8 bytes, such as `colossal_mpi.machine.measure` returns it.

    Returns
    -------
    GridChoice
        The grid with the least ``flop / flops + 8 words / bandwidth`` on the busiest rank. Ties go against cutting k,
        which adds and writes C once more, and then to fewer ranks.

    Raises
    ------
    ShapeError
        If a size is negative, there is no rank, or no grid fits the memory.

    Examples
    --------
    >>> choice = linalg.best_grid(20_000, 20_000, 20_000, ranks=127)
    >>> dict(choice.sizes)
    {'row': 5, 'col': 5, 'depth': 5}
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
    link = machine.near if ranks <= machine.ranks_per_node else machine.far
    flop_per_word = machine.flops * _ITEMSIZE / link.bandwidth
    return min(fitting, key=lambda c: (c.flop + flop_per_word * c.words, c.sizes["depth"], c.ranks))


def _grids(ranks: int) -> list[tuple[int, int, int]]:
    """Return all sizes of row, col and depth whose product is at most the number of ranks."""
    return [
        (pm, pn, pk)
        for pm in range(1, ranks + 1)
        for pn in range(1, ranks // pm + 1)
        for pk in range(1, ranks // (pm * pn) + 1)
    ]


def _choice(m: int, n: int, k: int, ranks: int, p: tuple[int, int, int]) -> GridChoice:
    (pm, pn, pk), (lm, ln, lk) = p, (-(-size // parts) for size, parts in zip((m, n, k), p, strict=True))
    # A[M_row, K_(depth,col)] -> A[M_row, K_depth], B[K_(depth,row), N_col] -> B[K_depth, N_col],
    # C[M_row, N_col] {U_depth} -> C[M_(row,depth), N_col]: each face is gathered or reduced over the third axis
    faces = ((lm * lk, pn), (lk * ln, pm), (lm * ln, pk))
    stored = sum(face / copies for face, copies in faces)
    workspace = sum(face for face, copies in faces if copies > 1)
    return GridChoice(
        sizes={"row": pm, "col": pn, "depth": pk},
        axes={"row": "m", "col": "n", "depth": "k"},
        words=sum(face * (1 - 1 / copies) for face, copies in faces),
        bound=lower_bound(m, n, k, ranks),
        flop=2 * lm * ln * lk,
        memory=math.ceil(stored) + workspace,
    )
