"""What a rank of a machine can do, and the time that a dry run would take on it.

Products and passes over arrays take what the slower of arithmetic and memory takes (the roofline model), and a message
takes ``latency + bytes / bandwidth`` (Hockney's model), on a node or between nodes.

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

_ALONE = ("send", "receive")


@dataclass(frozen=True)
class Link:
    """A way between two ranks."""

    latency: float
    """Seconds of a message without content."""
    bandwidth: float
    """Bytes/s that a rank receives."""


@dataclass(frozen=True)
class Machine:
    """What each rank can do while all others do the same.

    Attributes
    ----------
    flops : float
        Floating-point operations a second of large products.
    memory : float
        Bytes a second, read or written, of elementwise operations.
    call : float
        Seconds that each operation on an array takes besides: a kernel's launch.
    product : float
        Seconds that each product takes besides, with what Python does for the layer that it is of.
    near, far : Link
        Within a node and between nodes.
    ranks_per_node : int
        Consecutive ranks on one node.
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
        """Return the link between the ranks of a group, which `axes` of a grid span through `coords`."""
        stride, first, last = 1, 0, 0
        for axis in reversed(list(grid)):
            first += 0 if axis in axes else coords[axis] * stride
            last += (grid[axis] - 1 if axis in axes else coords[axis]) * stride
            stride *= grid[axis]
        return self.near if first // self.ranks_per_node == last // self.ranks_per_node else self.far

    def seconds(self, op: str, ranks: int, nbytes: int, link: Link) -> float:
        """Return the time of a collective of `ranks` ranks, of which each receives so many bytes."""
        rounds = 1 if op in _ALONE else math.ceil(math.log2(max(2, ranks)))
        return rounds * link.latency + nbytes / link.bandwidth


class Clock:
    """The time of a rank of a meta grid, as far as it has come.

    Parameters
    ----------
    machine : Machine
    grid, coords : mapping of str to int
        The axes of the whole grid, and where the rank is.
    """

    def __init__(self, machine: Machine, grid: Mapping[str, int], coords: Mapping[str, int]) -> None:
        self.machine, self.grid, self.coords, self.time = machine, grid, coords, 0.0
        self._free: dict[Link, float] = {}
        """When the last message that was begun on a link will have come."""

    def now(self) -> float:
        """Return the seconds since the beginning."""
        return self.time

    def compute(self, flops: float, nbytes: int) -> None:
        """Do one operation, of so many floating-point operations of products and bytes read and written."""
        m = self.machine
        self.time += m.call + (m.product if flops else 0.0) + max(flops / m.flops, nbytes / m.memory)

    def arrival(self, op: str, axes: Sequence[str], nbytes: int) -> float:
        """Begin a message or a collective, and return when it is there."""
        link = self.machine.link(axes, self.grid, self.coords)
        ranks = math.prod(self.grid[axis] for axis in axes)
        seconds = self.machine.seconds(op, ranks, nbytes, link)
        if not self.machine.overlap:
            self.time += seconds
            return self.time
        self._free[link] = max(self.time, self._free.get(link, 0.0)) + seconds
        return self._free[link]

    def wait(self, until: float) -> None:
        """Let time pass."""
        self.time = max(self.time, until)
