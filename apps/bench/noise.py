"""How much of a node other programs used while a benchmark ran: its times are worth little if that was much."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mpi4py import MPI

from colossal_mpi.apps.bench.memory import neighbours


class Meter:
    """Measures from its making on. Collective, as `foreign` is."""

    def __init__(self) -> None:
        self._busy, self._all, self._own = _readings()

    def foreign(self) -> float | None:
        """Return the share of the cores of rank 0's node that others used; None where the system does not say."""
        busy, every, own = _readings()
        share = (busy - self._busy - own + self._own) / (every - self._all) if every > self._all else None
        return MPI.COMM_WORLD.bcast(None if share is None else min(1.0, max(0.0, share)))


def _readings() -> tuple[float, float, float]:
    """Return seconds since the start: in which the node's cores worked, of all its cores, and of our own ranks."""
    times = MPI.COMM_WORLD.allgather(time.process_time())
    own = sum(times[rank] for rank in neighbours())
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0, 0.0, own
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is counted in user too
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in first.split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), own
