"""The order of a cut sequence: which tokens each rank of a ring holds, so that causal attention is equal work for all.

`Parallelism.order` chooses an order, tasks permute their tokens by it, and `Context.order` tells the layers. Attention
asks for the runs of consecutive tokens that a rank holds.

References
----------
Zhu: ring-flash-attention, 2024 (zig-zag). Brandon et al.: Striped attention, 2023 (the imbalance without it). Graham:
Bounds on multiprocessing timing anomalies, 1969 (the heaviest first).
"""

from __future__ import annotations

import numpy as np

from colossal_mpi.layout import part

MOST_RUNS = 16
"""Greatest number of runs of consecutive tokens that an order gives a rank."""
_EXCESS = 1.03
"""The work of the busiest rank over the mean with which an order is good enough."""
_SWAPS = 400
"""Greatest number of swaps of chunks."""


def zigzag(length: int, ranks: int) -> np.ndarray:
    """Return the order in which each rank holds two runs, as far from the start of a sequence as from its end.

    The causal query at index i sees i + 1 keys. Two queries at equal distances from the two ends see as many keys as
    two in the middle, so that all ranks have the same work.

    Parameters
    ----------
    length : int
        Tokens of the whole sequence.
    ranks : int
        Ranks that cut it.

    Returns
    -------
    array of int64, ``[length]``
        Element i is the index in the sequence of the token at index i of the arrays, which are cut in balanced blocks;
        it grows within a block.
    """
    index, blocks, first, last = np.arange(length), [], 0, length
    for rank in range(ranks):
        start, stop = part(length, ranks, rank)
        back = (stop - start) // 2
        front = stop - start - back
        blocks += [index[first : first + front], index[last - back : last]]
        first, last = first + front, last - back
    return np.concatenate(blocks)


def runs(order: np.ndarray | None, start: int, stop: int) -> list[tuple[int, int]]:
    """Return the runs of consecutive tokens that the indices `start` to `stop` of the arrays hold.

    Parameters
    ----------
    order : array of int, ``[s]``, optional
        As in `Context`; None: index i holds token i.
    start, stop : int
        A range of indices. An empty range has one run, which is empty.

    Returns
    -------
    list of (int, int)
        First token and end of each run, in the order of the arrays.
    """
    if order is None or start == stop:
        return [(start, stop)]
    tokens = np.asarray(order)[start:stop]
    cuts = np.flatnonzero(np.diff(tokens) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(tokens, cuts)]


def balanced(work: np.ndarray, ranks: int) -> np.ndarray:
    """Return an order in which the ranks of a ring have nearly the same work, whatever the work of each token is.

    The sequence is cut into chunks, equally many for each rank. They are dealt out by their work, the heaviest first,
    to and fro, and then swapped while that relieves the busiest rank. Of 2, 4, 8 and 16 chunks for each rank, the
    fewest are taken that leave no rank more than 3 % above the mean: neighbouring chunks see the same keys, and more
    chunks have more neighbours on other ranks.

    Parameters
    ----------
    work : array, ``[g, length]``
        Work of each token, such as the number of keys that it sees, for g groups of ranks that have a ring each.
    ranks : int
        Ranks of a ring.

    Returns
    -------
    array of int64, ``[length]``
        As `zigzag` returns it; that order itself if it is good enough.

    Examples
    --------
    >>> balanced(np.array([[1, 2, 1, 1, 1, 1, 1, 2]]), 2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    best, least = zigzag(work.shape[1], ranks), np.inf
    for chunks in (0, 2, 4, 8, MOST_RUNS):
        order = _dealt(work, ranks, chunks) if chunks else best
        if (excess := _excess(work, order, ranks)) < least:
            best, least = order, excess
        if least <= _EXCESS or 2 * chunks * ranks > work.shape[1]:
            break
    return best


def _excess(work: np.ndarray, order: np.ndarray, ranks: int) -> float:
    """Return the work of the busiest rank of a group over the mean of the group, for the worst group."""
    blocks = [order[slice(*part(len(order), ranks, rank))] for rank in range(ranks)]
    loads = np.stack([work[:, block].sum(1) for block in blocks], axis=1)
    return float((loads.max(1) / np.maximum(loads.mean(1), 1e-300)).max())


def _dealt(work: np.ndarray, ranks: int, chunks: int) -> np.ndarray:
    """Return an order of this number of chunks for each rank."""
    length = work.shape[1]
    sizes = np.array(
        [
            np.diff(part(stop - start, chunks, i))[0]
            for rank in range(ranks)
            for start, stop in [part(length, ranks, rank)]
            for i in range(chunks)
        ]
    )
    owner = np.repeat(np.arange(ranks), chunks)
    # slots of both sizes are spread over the sequence; a chunk keeps its size when it changes its rank
    spread = np.argsort(np.tile(np.arange(chunks), ranks), kind="stable")
    sizes, owner = sizes[spread], owner[spread]
    ends = np.cumsum(sizes)
    totals = np.concatenate([np.zeros((len(work), 1)), np.cumsum(work, axis=1)], axis=1)
    weights = np.diff(totals[:, np.concatenate([[0], ends])], axis=1)
    weights = (weights / np.maximum(weights.sum(1, keepdims=True), 1e-300)).T
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        heaviest = same[np.argsort(-weights[same].max(1), kind="stable")]
        owner[heaviest] = _to_and_fro(owner[same])
    _swap(weights, owner, sizes, ranks)
    return np.concatenate(
        [np.arange(ends[i] - sizes[i], ends[i]) for rank in range(ranks) for i in np.flatnonzero(owner == rank)]
    )


def _to_and_fro(owners: np.ndarray) -> np.ndarray:
    """Return owners in rounds, each of every owner that is left once, every second round backwards."""
    count = np.bincount(owners)
    rounds = [np.flatnonzero(count > i)[:: -1 if i % 2 else 1] for i in range(count.max())]
    return np.concatenate(rounds)


def _swap(weights: np.ndarray, owner: np.ndarray, sizes: np.ndarray, ranks: int) -> None:
    """Swap chunks of one size between the busiest rank and another, while that lowers the work of the busier one."""
    loads = np.stack([weights[owner == rank].sum(0) for rank in range(ranks)])
    for _ in range(_SWAPS):
        busiest = int(loads.max(1).argmax())
        mine, others = np.flatnonzero(owner == busiest), np.flatnonzero(owner != busiest)
        change = weights[others][None] - weights[mine][:, None]
        after = np.maximum((loads[busiest] + change).max(-1), (loads[owner[others]][None] - change).max(-1))
        after[sizes[mine][:, None] != sizes[others][None]] = np.inf
        i, j = np.unravel_index(after.argmin(), after.shape)
        if not after[i, j] < loads[busiest].max() - 1e-9:
            return
        other = int(owner[others[j]])
        loads[busiest], loads[other] = loads[busiest] + change[i, j], loads[other] - change[i, j]
        owner[mine[i]], owner[others[j]] = other, busiest
