"""What the time of a step goes into, and why one way to run is faster than another."""

from __future__ import annotations

from dataclasses import dataclass

from colossal_mpi.apps.planning.forecast import Forecast
from colossal_mpi.apps.text import duration


@dataclass(frozen=True)
class Shares:
    """Seconds of a step of the stage that has most to do."""

    computing: float
    communicating: float
    """In which it does nothing else."""
    waiting: float
    """For other stages."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.computing + self.communicating + self.waiting


def shares(one: Forecast) -> Shares:
    """Return what the time of a step goes into."""
    stage, busy = max(((i, cost.busy) for i, cost in enumerate(one.stages)), key=lambda pair: pair[1])
    inside = one.stages[stage].communicating
    return Shares(busy - inside, inside, max(0.0, one.seconds - busy))


def against(one: Forecast, best: Forecast) -> str:
    """Return in what a way to run loses most against the best one."""
    mine, other = shares(one), shares(best)
    losses = {name: getattr(mine, name) - getattr(other, name) for name in vars(mine)}
    name, most = max(losses.items(), key=lambda pair: pair[1])
    if most <= 0:
        return "as fast"
    what = {
        "computing": "more to compute",
        "communicating": f"more to move{_over(one)}",
        "waiting": "more waiting for stages",
    }
    return f"+{duration(most)}, {what[name]}"


def _over(one: Forecast) -> str:
    """Name the axes over which most is moved."""
    sums: dict[str, float] = {}
    for cost in one.stages:
        for axis, seconds in cost.seconds_by_axis.items():
            sums[axis] = max(sums.get(axis, 0.0), seconds)
    return f" over {max(sums, key=lambda axis: sums[axis])}" if sums else ""
