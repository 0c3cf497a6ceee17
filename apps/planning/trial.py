"""Steps of several ways to run, really done, all taking turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from colossal_mpi import comm
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.grid import Grid

_WARM = 2
"""Steps that are done before: weights and plans are made in the first one."""


def trial(configs: Sequence[Config], rounds: int) -> list[float]:
    """Return the median seconds of a step of each configuration, on the grids of this job.

    Weights and the optimizer's state of all of them are in memory together. Nothing is written.

    **Communication:** that of the steps, and a gather of a number before and after each.
    """
    trainers = [Trainer(config, Grid(None, config.parallel.device, **config.parallel.grid)) for config in configs]
    times: list[list[float]] = [[] for _ in configs]
    for step in range(_WARM + rounds):
        for trainer, taken in zip(trainers, times, strict=True):
            taken.append(_step(trainer, step))
    return [median(taken[_WARM:]) for taken in times]


def _step(trainer: Trainer, step: int) -> float:
    """Return the seconds of a step: those of the slowest rank."""
    comm.collect(None, trainer.grid)
    begun = time.perf_counter()
    trainer.step(step)
    return max(comm.collect(time.perf_counter() - begun, trainer.grid))
