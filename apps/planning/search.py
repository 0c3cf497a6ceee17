"""The search for the fastest configurations on a number of ranks of a machine.

The command ``plan`` calls `search`. It goes through `candidates`, estimates those that may be among the fastest, and
forecasts the best ones. The ranks of the job share the grids out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from operator import itemgetter
from typing import TypeVar

from colossal_mpi import comm
from colossal_mpi.apps.config import Config, problems
from colossal_mpi.apps.planning.candidates import Axes, grids, savings, schedules, with_settings
from colossal_mpi.apps.planning.estimate import Estimate, Estimates
from colossal_mpi.apps.planning.forecast import Forecast, forecast, sampled_forecast
from colossal_mpi.errors import ColossalError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.pipeline import PIPE
from colossal_mpi.machine import Machine

USABLE = 0.9
"""The share of a rank's memory that arrays may fill; the rest is for MPI, libraries, and gaps between arrays."""
_SHORTLIST = 2
"""Greatest number of configurations that are forecast, for each one that is returned."""
_GRIDS_PER_ROUND = 4
"""Grids that each rank of a team searches before it learns what the others have found."""

Progress = Callable[[int, int], object]
"""Called with the number of grids that are done and the number of all grids."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Plan:
    """The result of a search.

    Attributes
    ----------
    best : list of Forecast
        The best configuration of each grid and mode, the fastest first.
    grids : int
        Grids and modes that were searched.
    estimated : int
        Configurations that were estimated on them.
    unfit : int
        Grids and modes that need more memory than there is, whatever is recomputed.
    smallest : float
        Bytes of a rank that the least demanding configuration needs.
    sequences : bool
        Whether sequences were cut, because the batch is smaller than the ranks or nothing fits otherwise.
    """

    best: list[Forecast] = field(default_factory=list)
    grids: int = 0
    estimated: int = 0
    unfit: int = 0
    smallest: float = math.inf
    sequences: bool = False


def search(
    config: Config, ranks: int, machine: Machine, memory: float, count: int, team: Grid, progress: Progress
) -> Plan:
    """Return the best ways to run a configuration on a number of ranks.

    Parameters
    ----------
    config : Config
        The run. The search chooses its grid, modes, schedule and number of microbatches; the rest stays.
    ranks : int
        Ranks to plan for.
    machine : Machine
        The machine that they are on; rank 0's is used.
    memory : float
        Bytes of memory of a rank.
    count : int
        Number of configurations to return.
    team : Grid
        The ranks that share the search; all of them get the same plan.
    progress : callable
        Called with the number of grids and modes that are done, and the number of all.

    Notes
    -----
    **Communication:** a broadcast of rank 0's machine, and gathers of estimates and forecasts over the team, one
    for every four grids of a rank.
    """
    machine = comm.share(machine, team)  # each rank may have measured its own
    plan, estimates = Plan(), list[Estimate]()
    for sequences in sorted({config.training.batch < ranks, True}):
        places = grids(config, ranks, sequences)
        found = _searched(GridSearch(config, machine, USABLE * memory, _SHORTLIST * count), places, team, progress)
        estimates = [one.best for one in found if one.best]
        plan = _summed(found, sequences)
        if estimates:
            break
    shortlist = sorted(estimates, key=_seconds)[: _SHORTLIST * count]
    sampled = _spread(lambda one: sampled_forecast(one.config, machine).seconds, shortlist, team)
    order = [one.config for _, one in sorted(zip(sampled, shortlist, strict=True), key=itemgetter(0))]
    while order and len(plan.best) < count:
        for one in _spread(lambda config: forecast(config, machine), order[: team.size], team):
            plan.smallest = min(plan.smallest, one.peak)
            plan.best += [one] if one.peak <= USABLE * memory else []
        del order[: team.size]
    plan.best = sorted(plan.best[:count], key=_seconds)
    return plan


def _spread(function: Callable[[Item], Result], items: Sequence[Item], team: Grid) -> list[Result]:
    """Return the results of a function for items that the ranks of a team share out."""
    with comm.agreed(team):
        own = [function(item) for item in items[team.rank :: team.size]]
    results = comm.collect(own, team)
    return [results[i % team.size][i // team.size] for i in range(len(items))]


def _searched(
    grid_search: GridSearch, places: Sequence[tuple[Axes, str]], team: Grid, progress: Progress
) -> list[GridResult]:
    """Return the result of each grid and mode."""
    found: list[GridResult] = []
    while len(found) < len(places):
        progress(len(found), len(places))
        part = places[len(found) : len(found) + _GRIDS_PER_ROUND * team.size]
        found += _spread(lambda place: grid_search.search(*place), part, team)
        grid_search.seconds = [one.best.seconds for one in found if one.best]
    progress(len(found), len(places))
    return found


def _summed(found: Sequence[GridResult], sequences: bool) -> Plan:
    """Return the plan without its best configurations."""
    unfit = [one for one in found if one.count and one.best is None]
    return Plan(
        grids=len(found),
        estimated=sum(one.count for one in found),
        unfit=len(unfit),
        smallest=min((one.smallest for one in unfit), default=math.inf),
        sequences=sequences,
    )


def _seconds(one: Estimate | Forecast) -> float:
    return one.seconds


@dataclass(frozen=True)
class GridResult:
    """The result of a search on one grid, in one mode."""

    count: int
    """Configurations that were estimated."""
    best: Estimate | None
    """The fastest one that fits the memory."""
    smallest: float
    """Bytes of a rank that the least demanding one needs."""


class GridSearch:
    """The search for the fastest configuration on one grid after the other, by estimates.

    Parameters
    ----------
    config : Config
        The configuration to train.
    machine : Machine
    memory : float
        Bytes that the arrays of a rank may take.
    wanted : int
        Number of grids and modes to find. On a grid that cannot be among them not all candidates are estimated.
    """

    def __init__(self, config: Config, machine: Machine, memory: float, wanted: int) -> None:
        self.config, self.memory, self.wanted = config, memory, wanted
        self.seconds: list[float] = []
        """Seconds of the fastest configuration on each grid so far."""
        self._estimates = Estimates(machine)

    def search(self, axes: Axes, tensor: str) -> GridResult:
        """Return the best configuration on a grid, in a mode."""
        tried = list(self._promising(axes, tensor))
        best = min((one for one in tried if one.peak <= self.memory), key=_seconds, default=None)
        self.seconds += [best.seconds] if best else []
        return GridResult(len(tried), best, min((one.peak for one in tried), default=math.inf))

    def _promising(self, axes: Axes, tensor: str) -> Iterator[Estimate]:
        """Yield estimates: for each schedule the savings of memory, one after the other, until one fits.

        Once one fits, it leaves out candidates that cannot be faster than it or among the fastest of all grids.
        """
        limit, fits = self._limit, False
        for settings in schedules(self.config, axes):
            enough, one = False, None
            for zero, recompute in savings(axes):
                config = with_settings(self.config, axes, tensor, zero=zero, recompute=recompute, **settings)
                slowing = zero or "data" not in axes  # ZeRO 1 may be faster than none: its update is shared
                if fits and self._estimates.lower_bound(config) >= limit:
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
        """The seconds that a configuration must stay below to be among the wanted ones."""
        enough = len(self.seconds) >= self.wanted
        return nsmallest(self.wanted, self.seconds)[-1] if enough else math.inf

    def _estimate(self, config: Config) -> Estimate | None:
        """Return the estimate of a configuration, None if it cannot run."""
        try:
            return None if problems(config) else self._estimates.of(config)
        except ColossalError:
            return None
