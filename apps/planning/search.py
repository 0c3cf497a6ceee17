"""The best ways to run a configuration on so many ranks of a machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from colossal_mpi import comm
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.candidates import Axes, grids
from colossal_mpi.apps.planning.forecast import Forecast, forecast, sampled
from colossal_mpi.apps.planning.quick import Estimate
from colossal_mpi.apps.planning.rough import Rough, Tried
from colossal_mpi.grid import Grid
from colossal_mpi.meta.machine import Machine

USABLE = 0.9
"""Share of a rank's memory that arrays may fill; the rest is for MPI, the libraries, and what lies between arrays."""


Tell = Callable[[int, int], Any]
_CLOSER = 2
"""Times as many ways are looked at more closely than are returned."""
_ROUND = 4
"""Grids that each rank of a team looks at before it is told what the others have found."""


@dataclass
class Plan:
    """What a search has found."""

    best: list[Forecast] = field(default_factory=list)
    """The best of each grid and mode, exact, the fastest first."""
    grids: int = 0
    """Grids and modes that were looked at."""
    priced: int = 0
    """Ways to run on them whose memory and time were estimated."""
    unfit: int = 0
    """Grids and modes on which the memory is too small whatever is recomputed."""
    smallest: float = math.inf
    """Bytes of a rank that the least demanding way needs."""
    sequences: bool = False
    """Whether sequences were cut: the batch is smaller than the ranks, or nothing fits otherwise."""


def search(config: Config, ranks: int, machine: Machine, memory: float, count: int, team: Grid, tell: Tell) -> Plan:
    """Return the best ways to run a configuration.

    Parameters
    ----------
    config : Config
        Its grid, modes, schedule and number of microbatches are what is looked for; the rest stays.
    ranks : int
    machine : Machine
    memory : float
        Bytes of a rank.
    count : int
        Ways to return.
    team : Grid
        The ranks that share the work; all get the same plan.
    tell : callable
        Told, of the grids and modes, how many are done and how many there are.

    Notes
    -----
    **Communication:** a broadcast of rank 0's machine, and gathers of estimates and forecasts over the team, one
    for every four grids of a rank.
    """
    machine = comm.share(machine, team)  # each rank may have measured its own
    plan, found = Plan(), []
    for sequences in sorted({config.training.batch < ranks, True}):
        places = grids(config, ranks, sequences)
        tried = _looked(Rough(config, machine, USABLE * memory, _CLOSER * count), places, team, tell)
        found = [one.best for one in tried if one.best]
        plan = _summed(tried, sequences)
        if found:
            break
    closer = sorted(found, key=_seconds)[: _CLOSER * count]
    rough = _spread(lambda one: sampled(one.config, machine).seconds, closer, team)
    order = [one.config for _, one in sorted(zip(rough, closer, strict=True), key=itemgetter(0))]
    while order and len(plan.best) < count:
        for one in _spread(lambda config: forecast(config, machine), order[: team.size], team):
            plan.smallest = min(plan.smallest, one.peak)
            plan.best += [one] if one.peak <= USABLE * memory else []
        del order[: team.size]
    plan.best = sorted(plan.best[:count], key=_seconds)
    return plan


def _spread(function: Callable[[Any], Any], items: Sequence[Any], team: Grid) -> list[Any]:
    """Return what a function makes of items, which the ranks of a team share out."""
    with comm.agreed(team):
        mine = [function(item) for item in items[team.rank :: team.size]]
    told = comm.collect(mine, team)
    return [told[i % team.size][i // team.size] for i in range(len(items))]


def _looked(rough: Rough, places: Sequence[tuple[Axes, str]], team: Grid, tell: Tell) -> list[Tried]:
    """Return what was tried on each grid, in each mode."""
    tried: list[Tried] = []
    while len(tried) < len(places):
        tell(len(tried), len(places))
        some = places[len(tried) : len(tried) + _ROUND * team.size]
        tried += _spread(lambda place: rough.look(*place), some, team)
        rough.seconds = [one.best.seconds for one in tried if one.best]
    tell(len(tried), len(places))
    return tried


def _summed(tried: Sequence[Tried], sequences: bool) -> Plan:
    """Return the plan that has no best way yet."""
    unfit = [one for one in tried if one.count and one.best is None]
    return Plan(
        grids=len(tried),
        priced=sum(one.count for one in tried),
        unfit=len(unfit),
        smallest=min((one.smallest for one in unfit), default=math.inf),
        sequences=sequences,
    )


def _seconds(one: Estimate | Forecast) -> float:
    return one.seconds
