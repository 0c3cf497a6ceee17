"""The ranks of a node, and how much memory it has left."""

from __future__ import annotations

import functools
from pathlib import Path

from mpi4py import MPI

_SPARED = 0.9  # of what is free is counted on: the rest is for MPI, page tables and other programs
_CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def neighbours() -> list[int]:
    """Return the ranks of this rank's node. Collective when first called."""
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = node.allgather(MPI.COMM_WORLD.rank)
    node.Free()
    return ranks


def available() -> float:
    """Return the bytes that programs on this node can still take; infinite where the system does not say."""
    free = [_from_meminfo(), _from_cgroup("memory.max", "memory.current")]
    return _SPARED * min(free)


def _from_meminfo() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "inf")
    return float(kibibytes) * 1024


def _from_cgroup(limit: str, used: str) -> float:
    try:
        most, now = ((_CGROUP / name).read_text().strip() for name in (limit, used))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(now)
