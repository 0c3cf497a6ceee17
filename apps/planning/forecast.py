"""What a step of a run takes: memory, words and time of each stage, by a dry run on one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from colossal_mpi import meta
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.cost import Cost
from colossal_mpi.apps.training.tasks import StepFeed
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.grid import Grid
from colossal_mpi.layers.analysis.predict import Prediction, dry_run, predicted, stages
from colossal_mpi.layers.pipeline import PIPE, Instruction, Interval, makespan, program, simulate, verify
from colossal_mpi.meta.machine import Clock, Machine

_ENDS = 2
"""Microbatches of a dry run that stand for all: the first, and the last, whose backward pass reduces gradients."""


_PREFETCHES = 3
"""ZeRO stage whose first step finds out in which order weights are gathered: the later ones do so ahead."""


@dataclass(frozen=True)
class Forecast:
    """What a step of a configuration takes on its grid, on a machine.

    Attributes
    ----------
    config : Config
    machine : Machine
    stages : list of Cost
        Of the first rank of each stage.
    """

    config: Config
    machine: Machine
    stages: list[Cost]

    @property
    def ranks(self) -> int:
        """Ranks of the grid."""
        return math.prod(axes_of(self.config).values())

    @property
    def words(self) -> int:
        """Array elements that the rank that receives most does."""
        return max(one.words for one in self.stages)

    @property
    def messages(self) -> int:
        """Collectives and messages that the rank with most of them takes part in."""
        return max(one.messages for one in self.stages)

    @property
    def peak(self) -> int:
        """Bytes of arrays that are alive at any moment, on the rank that needs most."""
        return max(one.peak for one in self.stages)

    @cached_property
    def spans(self) -> list[Interval]:
        """What each stage computes when, in seconds."""

        def cost(step: Instruction, stage: int) -> float:
            return self.stages[stage].seconds_of(step)

        return simulate(programs(self.config), cost, self._transfer)

    @property
    def _transfer(self) -> float:
        """Return the seconds of the largest message between stages."""
        size = max(one.border for one in self.stages)
        link = self.machine.link((PIPE,), axes_of(self.config), self.stages[0].coords)
        return self.machine.seconds("receive", 2, size, link) if size else 0.0

    @property
    def bubble(self) -> float:
        """Share of the time from the first computation to the last in which stages wait for others."""
        computing = sum(span.stop - span.start for span in self.spans)
        return 1 - computing / makespan(self.spans) / len(self.stages)

    @property
    def seconds(self) -> float:
        """Of a step: those of the schedule and of what comes after it, the reductions that are left and the update."""
        return makespan(self.spans) + max(one.after for one in self.stages)


def axes_of(config: Config) -> dict[str, int]:
    """Return the axes of a configuration's grid."""
    return {str(axis): size for axis, size in config.parallel.grid.items()}


def programs(config: Config) -> list[list[Instruction]]:
    """Return what each stage does in a step, in order."""
    parallel, count = config.parallel, axes_of(config).get(PIPE, 1)
    order = (parallel.schedule, count, config.training.microbatches)
    return [list(program(*order, stage, parallel.virtual_stages)) for stage in range(count)]


def forecast(config: Config, machine: Machine) -> Forecast:
    """Return what a step of a configuration takes on its grid, which may have any number of ranks.

    Raises
    ------
    ColossalError
        As the run would, if it cannot be on that grid.
    """
    return Forecast(config, machine, [Cost(one) for one in dry_runs(config, machine)])


def sampled(config: Config, machine: Machine) -> Forecast:
    """Return what `forecast` does, from a dry run of the first and the last microbatch alone: sooner, and not exact."""
    training, chunks = config.training, config.parallel.virtual_stages
    others = max(0, training.microbatches - _ENDS)
    if not others:
        return forecast(config, machine)
    part = {"batch": _ENDS * -(-training.batch // training.microbatches), "microbatches": _ENDS}
    short = config.model_copy(update={"training": training.model_copy(update=part)})
    runs = zip(dry_runs(short, machine), verify(programs(config)).live, strict=True)
    return Forecast(config, machine, [Cost(one, others, live / chunks) for one, live in runs])


def dry_runs(config: Config, machine: Machine) -> Iterator[Prediction]:
    """Yield what the first rank of each stage does in a step."""
    for grid in stages(axes_of(config)):
        with dry_run(Clock(machine, grid.axes, grid.coords)) as tally:
            yield _dry_run(config, grid, tally)


def copies(config: Config) -> list[int]:
    """Return the bytes of host memory that background checkpoints take of the first rank of each stage."""
    with dry_run():
        return [Trainer(config, grid).copies for grid in stages(axes_of(config))]


def _dry_run(config: Config, grid: Grid, tally: meta.Tally) -> Prediction:
    trainer = Trainer(config, grid)
    if config.parallel.zero == _PREFETCHES:
        trainer.step(0)
    feed = StepFeed(trainer.task, 0, trainer.optimizer.loss_scale)
    return predicted(trainer.pipeline, trainer.optimizer, feed, tally, partial(trainer.step, 0))
