"""The order of the tokens of a sequence in arrays: zig-zag, which balances causal attention, and its stretches.

References
----------
Zhu: ring-flash-attention, 2024 (zig-zag). Brandon et al.: Striped attention, 2023 (the imbalance without it).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from colossal_mpi.layout import part


def zigzag(length: int, ranks: int) -> np.ndarray:
    """Return the order in which each of several ranks has two stretches: one from the start, one as far from the end.

    A causal query at index i sees i + 1 keys, so that two as far from both ends see as many as two in the middle.

    Returns
    -------
    array of int64, ``[length]``
        Of each index of the arrays, which are cut in balanced blocks, the index of its token in the sequence; within a
        block it grows.
    """
    index, blocks, first, last = np.arange(length), [], 0, length
    for rank in range(ranks):
        start, stop = part(length, ranks, rank)
        back = (stop - start) // 2
        front = stop - start - back
        blocks += [index[first : first + front], index[last - back : last]]
        first, last = first + front, last - back
    return np.concatenate(blocks)


def runs(order: Any, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the stretches of a sequence, first and end, that indices `start` to `stop` hold, one after the other.

    Parameters
    ----------
    order : array of int, ``[s]``, or None
        None: index i holds token i.
    start, stop : int
        Of an empty range there is one stretch, which is empty.
    """
    if order is None or start == stop:
        return [(start, stop)]
    some = np.asarray(order)[start:stop]
    cuts = np.flatnonzero(np.diff(some) != 1) + 1
    return [(int(piece[0]), int(piece[-1]) + 1) for piece in np.split(some, cuts)]
