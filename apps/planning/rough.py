"""The fastest way on each grid that fits, by estimates, and what need not be estimated to find it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest

from colossal_mpi.apps.config import Config, problems
from colossal_mpi.apps.planning.candidates import Axes, ladder, variants, with_settings
from colossal_mpi.apps.planning.quick import Estimate, Estimates
from colossal_mpi.errors import ColossalError
from colossal_mpi.layers.pipeline import PIPE
from colossal_mpi.meta.machine import Machine


@dataclass(frozen=True)
class Tried:
    """What was tried on a grid, in a mode."""

    count: int
    best: Estimate | None
    """The fastest that fits."""
    smallest: float
    """Bytes of the least demanding one."""


class Rough:
    """Estimates ways to run on one grid after the other.

    Parameters
    ----------
    config : Config
    machine : Machine
    memory : float
        Bytes that the arrays of a rank may take.
    wanted : int
        Grids and modes that are looked for: of those that cannot be among the fastest not all ways are estimated.
    """

    def __init__(self, config: Config, machine: Machine, memory: float, wanted: int) -> None:
        self.config, self.memory, self.wanted = config, memory, wanted
        self.seconds: list[float] = []
        """Of the fastest on each grid that was looked at."""
        self._estimates = Estimates(machine)

    def look(self, axes: Axes, tensor: str) -> Tried:
        """Return what was tried on a grid, in a mode."""
        tried = list(self._worth(axes, tensor))
        best = min((one for one in tried if one.peak <= self.memory), key=lambda one: one.seconds, default=None)
        self.seconds += [best.seconds] if best else []
        return Tried(len(tried), best, min((one.peak for one in tried), default=math.inf))

    def _worth(self, axes: Axes, tensor: str) -> Iterator[Estimate]:
        """Yield what is worth trying: of each variant the ladder's rungs until one fits.

        Once one does, what cannot be faster than it is left out, and what cannot be among the fastest of all grids.
        """
        limit, fits = self._limit, False
        for settings in variants(self.config, axes):
            enough, one = False, None
            for zero, recompute in ladder(axes):
                config = with_settings(self.config, axes, tensor, zero=zero, recompute=recompute, **settings)
                slowing = zero or "data" not in axes  # ZeRO 1 may be faster than none: its update is shared
                if fits and self._estimates.least(config) >= limit:
                    if slowing:
                        break
                    continue
                one = self._estimate(config)
                if one is None:
                    return
                yield one
                if one.peak <= self.memory:
                    enough, fits, limit = True, True, min(limit, one.seconds)
                if enough and slowing:
                    break
            if (enough and PIPE not in axes) or (one and one.stored > self.memory):
                return  # more microbatches cost time, or do not help

    @property
    def _limit(self) -> float:
        """The seconds that a grid must stay below to be among the wanted ones."""
        enough = len(self.seconds) >= self.wanted
        return nsmallest(self.wanted, self.seconds)[-1] if enough else math.inf

    def _estimate(self, config: Config) -> Estimate | None:
        """Return an estimate, None of what cannot be."""
        try:
            return None if problems(config) else self._estimates.of(config)
        except ColossalError:
            return None
