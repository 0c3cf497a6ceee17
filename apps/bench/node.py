"""The node of a rank: its ranks, its cores, its free memory, and its use by other programs.

The harness asks for the memory before it makes operands and for the noise after the rounds; competitors that use all
cores of the node ask for the cores.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path

from mpi4py import MPI

from colossal_mpi.runtime import launcher

_USABLE = 0.9  # share of the free memory; MPI, page tables and other programs need the rest
_CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def ranks() -> list[int]:
    """Return the ranks of this rank's node. Collective over all ranks when it is called first."""
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    found = node.allgather(MPI.COMM_WORLD.rank)
    node.Free()
    return found


def cores() -> set[int]:
    """Return the cores that the ranks of this node may use together. Collective over all ranks."""
    allowed = MPI.COMM_WORLD.allgather(launcher.cpus())
    return set().union(*(allowed[rank] for rank in ranks()))


def available_memory() -> float:
    """Return the bytes that programs on this node can still take; infinity where the system does not say."""
    return _USABLE * min(_free_memory(), _free_of_cgroup("memory.max", "memory.current"))


def _free_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    kibibytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "inf")
    return float(kibibytes) * 1024


def _free_of_cgroup(limit: str, used: str) -> float:
    try:
        most, now = ((_CGROUP / name).read_text().strip() for name in (limit, used))
    except OSError:
        return float("inf")
    return float("inf") if most == "max" else float(most) - float(now)


class NoiseMeter:
    """Measures how much of the node other programs use, from the moment it is made. Collective over all ranks."""

    def __init__(self) -> None:
        self._busy, self._all, self._own = _cpu_seconds()

    def foreign(self) -> float | None:
        """Return the share of the cores of rank 0's node that other programs used.

        It is None where the system does not say. Collective over all ranks.
        """
        busy, every, own = _cpu_seconds()
        share = (busy - self._busy - own + self._own) / (every - self._all) if every > self._all else None
        found: float | None = MPI.COMM_WORLD.bcast(None if share is None else min(1.0, max(0.0, share)))
        return found


def _cpu_seconds() -> tuple[float, float, float]:
    """Return the seconds since boot in which the cores worked, all seconds of the cores, and the ranks' seconds."""
    times = MPI.COMM_WORLD.allgather(time.process_time())
    own = sum(times[rank] for rank in ranks())
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0, 0.0, own
    # user, nice, system, idle, iowait, irq, softirq, steal; user contains the columns that follow
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), own
