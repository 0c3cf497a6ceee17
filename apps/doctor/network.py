"""The doctor's check of the network: latency and bandwidth between ranks, measured within a few seconds.

`examine` calls `measure` on all ranks and `check` on rank 0. ``colossal_mpi.machine`` times the messages. This module
chooses the ranks that exchange them, and says what is too slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpi4py import MPI

from colossal_mpi.apps.doctor.facts import Facts, nodes
from colossal_mpi.apps.doctor.finding import GOOD, WARNING, Finding
from colossal_mpi.machine import Link, measure_allreduce, measure_pair

_TOPIC = "network"
_PARTNERS = 8
"""Greatest number of other nodes that rank 0 exchanges messages with."""
_LATE_NEAR, _LATE_FAR, _NARROW_FAR = 50e-6, 100e-6, 0.5e9
"""Limits of the latency in seconds, within a node and between nodes, and of the bandwidth between nodes in bytes/s.
Shared memory is faster even on a slow machine, and only TCP over a slow network is slower."""


@dataclass(frozen=True)
class NamedLink(Link):
    """A measured link, with the ranks that it connects.

    Attributes
    ----------
    latency : float
        Seconds of a message of 8 bytes one way, or of an allreduce of 8 bytes.
    bandwidth : float
        Bytes/s of messages of 4 MiB, or that each rank sends in an allreduce of 4 MiB.
    name : str
        The ranks.
    near : bool
        Whether all of them are on one node.
    """

    name: str
    near: bool


def partners(facts: Sequence[Facts]) -> list[int]:
    """Return the ranks that rank 0 exchanges messages with: one on its own node, one on each of some others."""
    groups = nodes(facts)
    near = [one["rank"] for one in groups[0][1:2]]
    return near + [group[0]["rank"] for group in groups[1 : 1 + _PARTNERS]]


def measure(facts: Sequence[Facts], world: MPI.Intracomm, seconds: float) -> list[NamedLink]:
    """Return, on rank 0, the links from rank 0 to some partners and the link of an allreduce over all ranks.

    Parameters
    ----------
    facts : sequence of Facts
        What each rank knows about itself.
    world : mpi4py.MPI.Intracomm
        All ranks; all of them call.
    seconds : float
        Time to spend.

    Returns
    -------
    list of NamedLink
        Empty on the other ranks, and if there is only one.

    Notes
    -----
    **Communication:** messages between rank 0 and each partner, and allreduces, as many as there is time for.
    """
    if world.size == 1:
        return []
    own, others = facts[0]["node"], partners(facts)
    share, links = seconds / (len(others) + 1), []
    for other in others:
        link = measure_pair(world, other, share)
        links.append(NamedLink(link.latency, link.bandwidth, f"ranks 0, {other}", facts[other]["node"] == own))
    link = measure_allreduce(world, share)
    near = all(one["node"] == own for one in facts)
    links.append(NamedLink(link.latency, link.bandwidth, f"allreduce of {world.size}", near))
    return links if world.rank == 0 else []


def check(links: Sequence[NamedLink], late: str) -> list[Finding]:
    """Return the findings about the links; `late` is the remedy for late messages within a node."""
    if not links:
        text = "alone, there is nothing to measure: `colossal-mpi run -n 2 colossal-mpi doctor` does"
        return [Finding(_TOPIC, GOOD, text)]
    return [found for link in links if (found := _problem(link, late))] or [
        Finding(_TOPIC, GOOD, "latency and bandwidth as below")
    ]


def _problem(link: NamedLink, late: str) -> Finding | None:
    """Return a warning if a link is slower than its limits."""
    figures = f"{link.name}: {link.latency * 1e6:,.1f} us, {link.bandwidth / 1e9:,.2f} GB/s"
    if link.near and link.latency > _LATE_NEAR:
        return Finding(_TOPIC, WARNING, f"{figures}, within a node", late)
    if not link.near and (link.latency > _LATE_FAR or link.bandwidth < _NARROW_FAR):
        remedy = "MPI may use TCP: see FI_PROVIDER (MPICH, Intel MPI: fi_info), UCX_TLS, or --mca pml ucx (Open MPI)"
        return Finding(_TOPIC, WARNING, f"{figures}, between nodes", remedy)
    return None
