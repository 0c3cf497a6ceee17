"""The forecast of a training step: memory, words and time of each pipeline stage, from dry runs on one process.

`search` and the commands of this package call `forecast`. It runs the trainer of ``apps.training`` on the first rank of
each stage of a meta grid, and lets the simulator of ``layers.pipeline`` put the stages together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from colossal_mpi import ledger, meta
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.training import Trainer
from colossal_mpi.apps.training.tasks import StepFeed
from colossal_mpi.grid import Grid
from colossal_mpi.layers.analysis import StepCost, cost_of_step, dry_run, stage_grids
from colossal_mpi.layers.pipeline import (
    PIPE,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Interval,
    makespan,
    program,
    simulate,
    verify,
)
from colossal_mpi.machine import Clock, Machine

_KINDS = {Forward: "forward", BackwardInput: "backward", BackwardWeight: "weight"}
"""The ledger's names of the passes."""
_BETWEEN_STAGES = ("send", "receive")
"""The ledger's names of messages between stages."""
_SAMPLE = 2
"""Number of microbatches of a dry run that stands for the whole step: the first one, and the last one, whose backward
pass reduces gradients."""
_PREFETCHES = 3
"""The ZeRO stage whose first step records the order of gathering weights, so that later steps prefetch them."""


class StageCost:
    """The cost of one training step on the first rank of a stage: memory, words and time.

    Parameters
    ----------
    run : StepCost
        A dry run of the step with a clock, or of a step with fewer microbatches.
    others : int
        Microbatches that the dry run left out. Each of them costs as much as the first one.
    live : float, optional
        The most microbatches that the whole step keeps at once; by default the dry run's.
    """

    def __init__(self, run: StepCost, others: int = 0, live: float | None = None) -> None:
        self.run, self.others = run, others
        self.live = run.live if live is None else live
        self.coords: Mapping[str, int] = run.coords
        self._passes = [s for s in run.record.spans if s.depth == 0 and s.kind in _KINDS.values()]

    @property
    def peak(self) -> int:
        """The most bytes of arrays that are alive at any moment."""
        return self.run.peak + round((self.live - self.run.live) * self.run.saved)

    @property
    def stored(self) -> int:
        """Bytes of weights, gradients and the state of the optimizer."""
        return self.run.weights + self.run.gradients + self.run.state

    @property
    def words(self) -> int:
        """Array elements received."""
        return sum(self.words_by_axis.values())

    @cached_property
    def words_by_axis(self) -> dict[str, int]:
        """Array elements received over each group of axes."""
        return {axis: round(words) for axis, words in self._sums(lambda event: event.words).items()}

    @cached_property
    def seconds_by_axis(self) -> dict[str, float]:
        """Seconds that the rank spends on nothing but communication over each group of axes."""
        return self._sums(lambda event: event.seconds)

    @property
    def messages(self) -> int:
        """Number of collectives and of messages between stages."""
        return round(sum(self._sums(lambda _: 1).values()))

    def _sums(self, value: Callable[[ledger.Event], float]) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for event in self.run.record.events:
            sums[event.axis] += value(event) * self._repetitions(event)
        return dict(sums)

    def _repetitions(self, event: ledger.Event) -> float:
        """Return how often the step repeats a message of the dry run."""
        if not self.others:
            return 1
        if event.op in _BETWEEN_STAGES:  # the dry run had two microbatches
            return 1 + self.others / 2
        inside = any(s.begun <= event.begun < s.ended for s in self._passes if s.what["microbatch"] == 0)
        return 1 + self.others * inside

    @property
    def largest_message(self) -> int:
        """Bytes of the largest message from another stage."""
        return max((e.bytes for e in self.run.record.events if e.op == "receive"), default=0)

    @cached_property
    def _seconds(self) -> dict[tuple[str, int, int], float]:
        """Seconds of each pass of each microbatch through each chunk."""
        sums: dict[tuple[str, int, int], float] = defaultdict(float)
        for span in self._passes:
            sums[span.kind, span.what["microbatch"], span.what["chunk"]] += span.ended - span.begun
        return sums

    def seconds_of(self, step: Instruction) -> float:
        """Return the seconds of a computation of the schedule; 0 for a transfer."""
        kind = _KINDS.get(type(step))
        if kind is None:
            return 0.0
        return self._seconds.get((kind, max(0, step.microbatch - self.others), step.chunk), 0.0)

    @property
    def busy(self) -> float:
        """Seconds of a step in which the rank does not wait for other stages."""
        times = {key: self.others + 1 if key[1] == 0 else 1 for key in self._seconds}
        return sum(seconds * times[key] for key, seconds in self._seconds.items()) + self.after

    @property
    def communicating(self) -> float:
        """The part of `busy` in which the rank only communicates with ranks of its own stage, in seconds."""
        own = [event for event in self.run.record.events if event.op not in _BETWEEN_STAGES]
        return sum(event.seconds * self._repetitions(event) for event in own)

    @property
    def after(self) -> float:
        """Seconds of a step besides its passes and the messages between stages: reductions and the update."""
        waits = sum(event.seconds for event in self.run.record.events if event.op in _BETWEEN_STAGES)
        return max(0.0, self.run.seconds - sum(self._seconds.values()) - waits)


@dataclass(frozen=True)
class Forecast:
    """The cost of a training step of a configuration on its grid, on a machine.

    Where documents are kept apart and a ring cuts the sequence, words and time depend on the documents of the batch and
    on the rank: they are those of the first step on the first rank of each stage.

    Attributes
    ----------
    config : Config
    machine : Machine
    stages : list of StageCost
        The first rank of each stage, whose blocks are the largest.
    """

    config: Config
    machine: Machine
    stages: list[StageCost]

    @property
    def ranks(self) -> int:
        """Number of ranks of the grid."""
        return math.prod(axes_of(self.config).values())

    @property
    def words(self) -> int:
        """Array elements that the first rank of the busiest stage receives."""
        return max(stage.words for stage in self.stages)

    @property
    def messages(self) -> int:
        """Collectives and messages between stages that the first rank of the busiest stage takes part in."""
        return max(stage.messages for stage in self.stages)

    @property
    def peak(self) -> int:
        """The most bytes of arrays that are alive at any moment, on the rank that needs most."""
        return max(stage.peak for stage in self.stages)

    @cached_property
    def spans(self) -> list[Interval]:
        """The computations of each stage, with their start and stop in seconds."""

        def cost(step: Instruction, stage: int) -> float:
            return self.stages[stage].seconds_of(step)

        return simulate(programs(self.config), cost, self._transfer)

    @property
    def _transfer(self) -> float:
        """The seconds of the largest message between stages."""
        size = max(stage.largest_message for stage in self.stages)
        link = self.machine.link((PIPE,), axes_of(self.config), self.stages[0].coords)
        return self.machine.seconds("receive", 2, size, link) if size else 0.0

    @property
    def bubble(self) -> float:
        """The share of the schedule's time, summed over stages, in which a stage waits for others."""
        computing = sum(span.stop - span.start for span in self.spans)
        return 1 - computing / makespan(self.spans) / len(self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of a step: the schedule, and the reductions and the update after it."""
        return makespan(self.spans) + max(stage.after for stage in self.stages)


def axes_of(config: Config) -> dict[str, int]:
    """Return the axes of a configuration's grid and their sizes."""
    return {str(axis): size for axis, size in config.parallel.grid.items()}


def programs(config: Config) -> list[list[Instruction]]:
    """Return the instructions of each stage for a step, in order."""
    parallel, count = config.parallel, axes_of(config).get(PIPE, 1)
    order = (parallel.schedule, count, config.training.microbatches)
    return [list(program(*order, stage, parallel.virtual_stages)) for stage in range(count)]


def forecast(config: Config, machine: Machine) -> Forecast:
    """Return the forecast of a step of a configuration on its grid, which may have any number of ranks.

    Raises
    ------
    ColossalError
        The error that the run itself would raise, if it cannot run on that grid.
    """
    return Forecast(config, machine, [StageCost(run) for run in dry_runs(config, machine)])


def sampled_forecast(config: Config, machine: Machine) -> Forecast:
    """Return an approximate forecast from a dry run of the first and the last microbatch, sooner than `forecast`."""
    training, chunks = config.training, config.parallel.virtual_stages
    others = max(0, training.microbatches - _SAMPLE)
    if not others:
        return forecast(config, machine)
    sample = {"batch": _SAMPLE * -(-training.batch // training.microbatches), "microbatches": _SAMPLE}
    short = config.model_copy(update={"training": training.model_copy(update=sample)})
    runs = zip(dry_runs(short, machine), verify(programs(config)).live, strict=True)
    return Forecast(config, machine, [StageCost(run, others, live / chunks) for run, live in runs])


def dry_runs(config: Config, machine: Machine) -> Iterator[StepCost]:
    """Yield the dry run of a step on the first rank of each stage."""
    for grid in stage_grids(axes_of(config)):
        with dry_run(Clock(machine, grid.axes, grid.coords)) as tally:
            yield _dry_run(config, grid, tally)


def checkpoint_copies(config: Config) -> list[int]:
    """Return the bytes of host memory that background checkpoints take on the first rank of each stage."""
    with dry_run():
        return [Trainer(config, grid).copies for grid in stage_grids(axes_of(config))]


def _dry_run(config: Config, grid: Grid, tally: meta.Tally) -> StepCost:
    trainer = Trainer(config, grid)
    if config.parallel.zero == _PREFETCHES:
        trainer.step(0)
    feed = StepFeed(trainer.task, 0, trainer.optimizer.loss_scale)
    return cost_of_step(trainer.pipeline, trainer.optimizer, feed, tally, partial(trainer.step, 0))
