"""The rates of one rank of a machine, and a clock that predicts the time of a program on it.

An operation takes as long as the slower one of arithmetic and memory (the roofline model), and a message takes
``latency + bytes / bandwidth`` (Hockney's model), within a node or between nodes. ``linalg`` prices products with a
`Machine`; a dry run on a meta grid moves its `Clock` forward.

References
----------
R. W. Hockney, The communication challenge for MPP, Parallel Computing 1994. R. Thakur, R. Rabenseifner and W. Gropp,
Optimization of collective communication operations in MPICH, 2005. S. Williams, A. Waterman and D. Patterson, Roofline,
2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_POINT_TO_POINT = ("send", "receive")


@dataclass(frozen=True)
class Link:
    """A connection between ranks.

    Parameters
    ----------
    latency : float
        Seconds that a message without content takes.
    bandwidth : float
        Bytes/s that a rank receives.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """The rates of each rank while all other ranks do the same.

    Parameters
    ----------
    flops : float
        Flop/s of large products.
    memory : float
        Bytes/s that elementwise operations read and write.
    call : float
        Seconds of overhead of each operation on an array, such as the launch of a kernel.
    product : float
        Seconds of overhead of each product, besides `call`.
    near : Link
        The link between ranks of one node.
    far : Link
        The link between ranks of different nodes.
    ranks_per_node : int
        Number of consecutive ranks on one node.
    overlap : bool
        Whether messages move while a rank computes; false where the same cores do both.
    """

    flops: float
    memory: float
    call: float
    product: float
    near: Link
    far: Link
    ranks_per_node: int
    overlap: bool = True

    def link(self, axes: Sequence[str], grid: Mapping[str, int], coords: Mapping[str, int]) -> Link:
        """Return the link between the ranks of a group.

        Parameters
        ----------
        axes : sequence of str
            The axes that span the group.
        grid : mapping of str to int
            The sizes of all axes of the grid, outermost first.
        coords : mapping of str to int
            The coordinates of one rank of the group.

        Returns
        -------
        Link
            `near` if all ranks of the group are on one node, else `far`.
        """
        stride, first, last = 1, 0, 0
        for axis in reversed(list(grid)):
            first += 0 if axis in axes else coords[axis] * stride
            last += (grid[axis] - 1 if axis in axes else coords[axis]) * stride
            stride *= grid[axis]
        return self.near if first // self.ranks_per_node == last // self.ranks_per_node else self.far

    def seconds(self, op: str, ranks: int, nbytes: int, link: Link) -> float:
        """Return the time of a message or a collective.

        Parameters
        ----------
        op : str
            The name that the ledger gives it: ``"send"`` and ``"receive"`` take one latency, collectives log2 of the
            number of ranks.
        ranks : int
            Number of ranks of the group.
        nbytes : int
            Bytes that each rank receives.
        link : Link
            The link between the ranks.

        Returns
        -------
        float
            Seconds.
        """
        rounds = 1 if op in _POINT_TO_POINT else math.ceil(math.log2(max(2, ranks)))
        return rounds * link.latency + nbytes / link.bandwidth


FREE_LINK = Link(0.0, math.inf)
"""A link on which messages take no time."""

TYPICAL = Machine(
    flops=25e9,
    memory=24e9,
    call=1e-6,
    product=2e-6,
    near=Link(5e-6, 4e9),
    far=Link(5e-6, 4e9),
    ranks_per_node=1,
    overlap=False,
)
"""One core of a server in float64, where nothing has been measured: 50 flop take as long as receiving one word."""


class Clock:
    """The time that has passed on one rank of a meta grid.

    ``meta.tally`` reports operations to it, and the ledger reports messages and reads its time (``ledger.timed_by``).

    Parameters
    ----------
    machine : Machine
        The machine, which gives the times of operations and messages.
    grid : mapping of str to int
        The sizes of all axes of the grid, outermost first.
    coords : mapping of str to int
        The coordinates of the rank.
    """

    def __init__(self, machine: Machine, grid: Mapping[str, int], coords: Mapping[str, int]) -> None:
        self.machine, self.grid, self.coords, self.time = machine, grid, coords, 0.0
        self._free: dict[Link, float] = {}
        """The time at which each link will have delivered the last message that was begun on it."""

    def now(self) -> float:
        """Return the time that has passed.

        Returns
        -------
        float
            Seconds since the clock was made.
        """
        return self.time

    def compute(self, flops: float, nbytes: int) -> None:
        """Let the time of one operation pass.

        Parameters
        ----------
        flops : float
            Flop of the operation if it is a product, else 0.
        nbytes : int
            Bytes that it reads and writes.
        """
        m = self.machine
        self.time += m.call + (m.product if flops else 0.0) + max(flops / m.flops, nbytes / m.memory)

    def arrival(self, op: str, axes: Sequence[str], nbytes: int) -> float:
        """Begin a message or a collective.

        Parameters
        ----------
        op : str
            The name that the ledger gives it.
        axes : sequence of str
            The axes that span its group.
        nbytes : int
            Bytes that this rank receives.

        Returns
        -------
        float
            The time at which it has arrived. Messages on one link follow one another.
        """
        link = self.machine.link(axes, self.grid, self.coords)
        ranks = math.prod(self.grid[axis] for axis in axes)
        seconds = self.machine.seconds(op, ranks, nbytes, link)
        if not self.machine.overlap:
            self.time += seconds
            return self.time
        self._free[link] = max(self.time, self._free.get(link, 0.0)) + seconds
        return self._free[link]

    def wait(self, until: float) -> None:
        """Let time pass until a moment, unless it has passed already.

        Parameters
        ----------
        until : float
            Seconds since the clock was made.
        """
        self.time = max(self.time, until)
