"""The best ways to run a configuration on so many ranks of a machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from colossal_mpi.apps.combinations import problems
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.candidates import Axes, grids, ladder, variants, with_settings
from colossal_mpi.apps.planning.forecast import Forecast, forecast, sampled
from colossal_mpi.apps.planning.quick import Estimate, Estimates
from colossal_mpi.errors import ColossalError
from colossal_mpi.layers.stage import PIPE
from colossal_mpi.machine import Machine

USABLE = 0.9
"""Share of a rank's memory that arrays may fill; the rest is for MPI, the libraries, and what lies between arrays."""


Tell = Callable[[int, int], Any]
_CLOSER = 2
"""Times as many ways are looked at more closely than are returned."""


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


def search(config: Config, ranks: int, machine: Machine, memory: float, count: int, tell: Tell) -> Plan:
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
    tell : callable
        Told, of the grids and modes, how many are done and how many there are.
    """
    plan, estimates = Plan(), Estimates(machine)
    found = _fitting(config, ranks, config.training.batch < ranks, estimates, memory, plan, tell)
    if not found and not plan.sequences:
        plan = Plan()
        found = _fitting(config, ranks, True, estimates, memory, plan, tell)
    closer = [sampled(one.config, machine) for one in sorted(found, key=_seconds)[: _CLOSER * count]]
    for rough in sorted(closer, key=_seconds):
        one = forecast(rough.config, machine)
        plan.smallest = min(plan.smallest, one.peak)
        plan.best += [one] if one.peak <= USABLE * memory else []
        if len(plan.best) == count:
            break
    plan.best.sort(key=_seconds)
    return plan


def _fitting(
    config: Config, ranks: int, sequences: bool, estimates: Estimates, memory: float, plan: Plan, tell: Tell
) -> list[Estimate]:
    """Return the fastest way for each grid and mode on which the memory is enough."""
    places, found = grids(config, ranks, sequences), []
    plan.grids, plan.sequences = len(places), sequences
    for number, (axes, tensor) in enumerate(places):
        tell(number, len(places))
        tried = list(_priced(config, axes, tensor, estimates, memory))
        plan.priced += len(tried)
        fitting = [one for one in tried if one.peak <= USABLE * memory]
        if fitting:
            found.append(min(fitting, key=_seconds))
        elif tried:
            plan.unfit, plan.smallest = plan.unfit + 1, min(plan.smallest, *(one.peak for one in tried))
    tell(len(places), len(places))
    return found


def _seconds(one: Estimate | Forecast) -> float:
    return one.seconds


def _priced(config: Config, axes: Axes, tensor: str, estimates: Estimates, memory: float) -> Iterator[Estimate]:
    """Yield what is worth trying on a grid: of each variant the ladder's rungs until one fits."""
    for settings in variants(config, axes):
        fits = one = None
        for zero, recompute in ladder(axes):
            one = _tried(with_settings(config, axes, tensor, zero=zero, recompute=recompute, **settings), estimates)
            if one is None:
                return
            yield one
            fits = fits or one.peak <= USABLE * memory
            if fits and (zero or "data" not in axes):  # ZeRO 1 may be faster than none: its update is shared
                break
        if (fits and PIPE not in axes) or (one and one.stored > USABLE * memory):
            return  # more microbatches cost time, or do not help


def _tried(config: Config, estimates: Estimates) -> Estimate | None:
    """Return an estimate, None of what cannot be."""
    try:
        return None if problems(config) else estimates.of(config)
    except ColossalError:
        return None
