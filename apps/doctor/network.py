"""Latency and bandwidth between ranks, measured within a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi.apps.doctor.facts import Facts, nodes
from colossal_mpi.apps.doctor.finding import GOOD, WARNING, Finding

SMALL, LARGE = 8, 4 << 20
"""Bytes of the messages whose latency and whose bandwidth are measured."""
_TOPIC, _TAG, _PARTNERS = "network", 11, 8
_MOST = 2000  # rounds
# What shared memory does not need even on a slow machine, and what only TCP over a slow network does not reach.
_LATE_NEAR, _LATE_FAR, _NARROW_FAR = 50e-6, 100e-6, 0.5e9


@dataclass(frozen=True)
class Link:
    """What was measured between two ranks, or of an allreduce over all of them."""

    name: str
    near: bool
    """Whether all of it is on one node."""
    latency: float
    """Seconds of a message of `SMALL` bytes, one way; of an allreduce of as many."""
    bandwidth: float
    """Bytes/s of messages of `LARGE` bytes; of an allreduce, those that each rank sends, ``2 (p - 1) / p n``."""


def partners(facts: Sequence[Facts]) -> list[int]:
    """Return the ranks that rank 0 exchanges messages with: one on its own node and one on some others."""
    groups = nodes(facts)
    near = [one["rank"] for one in groups[0][1:2]]
    return near + [group[0]["rank"] for group in groups[1 : 1 + _PARTNERS]]


def measure(facts: Sequence[Facts], world: MPI.Intracomm, seconds: float) -> list[Link]:
    """Return the links from rank 0 to some partners and that of all ranks; on rank 0 only.

    **Communication:** as much as there is time for.
    """
    if world.size == 1:
        return []
    own, others = facts[0]["node"], partners(facts)
    share, links = seconds / (2 * len(others) + 2), []
    for other in others:
        latency, large = (_pingpong(world, other, size, share) for size in (SMALL, LARGE))
        near = facts[other]["node"] == own
        links.append(Link(f"ranks 0, {other}", near, latency, LARGE / large))
    latency, large = (_allreduce(world, size, share) for size in (SMALL, LARGE))
    moved = 2 * (world.size - 1) / world.size * LARGE
    near = all(one["node"] == own for one in facts)
    links.append(Link(f"allreduce of {world.size}", near, latency, moved / large))
    return links if world.rank == 0 else []


def _pingpong(world: MPI.Intracomm, other: int, size: int, seconds: float) -> float:
    """Return the median seconds of a message one way between rank 0 and another; 1 on ranks that have no part in it."""
    buffer, result = np.zeros(size, np.uint8), 1.0
    if world.rank == 0:

        def round_trip() -> None:
            world.Send(buffer, other, _TAG)
            world.Recv(buffer, other, _TAG)

        result = _timed(round_trip, seconds, lambda count: world.send(count, other, _TAG)) / 2
    elif world.rank == other:

        def answer() -> None:
            world.Recv(buffer, 0, _TAG)
            world.Send(buffer, 0, _TAG)

        _timed(answer, seconds, lambda _: world.recv(source=0, tag=_TAG))
    _rest(world)
    return result


def _allreduce(world: MPI.Intracomm, size: int, seconds: float) -> float:
    """Return the median seconds of an allreduce of `size` bytes."""
    mine, total = np.zeros(size // 8), np.empty(size // 8)
    return _timed(lambda: world.Allreduce(mine, total), seconds, world.bcast)


def _timed(action: Callable[[], None], seconds: float, agree: Callable[[int], Any]) -> float:
    """Return the median seconds of an action that is done as often as there is time for: `agree` tells how often."""
    first = [_seconds(action) for _ in range(3)]
    count = int(min(max(seconds / max(*first, 1e-7), 3), _MOST))
    told = agree(count)
    return statistics.median(_seconds(action) for _ in range(count if told is None else told))


def _seconds(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _rest(world: MPI.Intracomm) -> None:
    """Wait for all ranks without taking a core from those that are measuring."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


def check(links: Sequence[Link], late: str) -> list[Finding]:
    """Return what there is to say about the links; `late` is the remedy for late messages within a node."""
    if not links:
        text = "alone, there is nothing to measure: `colossal-mpi run -n 2 colossal-mpi doctor` does"
        return [Finding(_TOPIC, GOOD, text)]
    return [found for link in links if (found := _judged(link, late))] or [
        Finding(_TOPIC, GOOD, "latency and bandwidth as below")
    ]


def _judged(link: Link, late: str) -> Finding | None:
    figures = f"{link.name}: {link.latency * 1e6:,.1f} us, {link.bandwidth / 1e9:,.2f} GB/s"
    if link.near and link.latency > _LATE_NEAR:
        return Finding(_TOPIC, WARNING, f"{figures}, within a node", late)
    if not link.near and (link.latency > _LATE_FAR or link.bandwidth < _NARROW_FAR):
        remedy = "MPI may use TCP: see FI_PROVIDER (MPICH, Intel MPI: fi_info), UCX_TLS, or --mca pml ucx (Open MPI)"
        return Finding(_TOPIC, WARNING, f"{figures}, between nodes", remedy)
    return None
