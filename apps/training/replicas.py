"""The comparison of replicas: weights and states of the optimizer that several ranks hold must be equal, bit for bit.

A flipped bit in the memory of one rank, or a reduction that gives ranks other bits, drives replicas apart, and nothing
else would tell. The training loop calls `require_equal_replicas` every ``training.check_replicas`` steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import MismatchError
from colossal_mpi.grid import Grid


def require_equal_replicas(arrays: Mapping[str, DistArray], grid: Grid, when: str) -> None:
    """Check that all ranks that hold the same part of an array hold the same bits of it.

    Parameters
    ----------
    arrays : mapping of str to DistArray
        This rank's arrays by name, without partial sums, on `grid` or sub-grids of it.
    grid : Grid
        The grid of all ranks.
    when : str
        The time of the comparison, as the error begins.

    Raises
    ------
    MismatchError
        If they differ, on all ranks: it names the first array that differs, the ranks, and how many arrays differ.

    Notes
    -----
    **Communication:** 4 bytes and the box of each array are collected from each rank; the ledger does not count them.
    Each rank reads its blocks once.
    """
    own = [(name, array.box, comm.check.checksum(array.local)) for name, array in arrays.items()]
    holders = dict[tuple[str, object], dict[int, list[int]]]()
    for rank, of_rank in enumerate(comm.collect(own, grid)):
        for name, box, checksum in of_rank:
            holders.setdefault((name, box), {}).setdefault(checksum, []).append(rank)
    apart = [(name, sorted(groups.values())) for (name, _), groups in holders.items() if len(groups) > 1]
    if apart:
        name, groups = apart[0]
        most = max(groups, key=len)
        others = sorted(rank for ranks in groups if ranks is not most for rank in ranks)
        count = len({name for name, _ in apart})
        raise MismatchError(
            f"{when}: the replicas of {name} differ: {_ranks(others)} from {_ranks(most)}; {count} of the arrays "
            "differ. Memory or a message was damaged: go on from an earlier checkpoint, with --resume, on other nodes"
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
