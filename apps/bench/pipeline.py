"""``colossal-mpi bench pipeline``: how long the stages of a pipeline wait, by every schedule, all taking turns.

The bubble is the share of the ranks' time, from the first computation of a step to the last, in which they compute
nothing. Beside what is measured stands what the simulator makes of the measured times of forward, input and weight
parts, on as many stages and on more.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import threadpoolctl
import typer
from mpi4py import MPI

from colossal_mpi import comm, ledger
from colossal_mpi.apps import launch
from colossal_mpi.apps.bench import steps, timeline, timing
from colossal_mpi.apps.bench.noise import Meter
from colossal_mpi.apps.bench.timeline import KINDS, Bar, Chart
from colossal_mpi.apps.command import Command, JsonFile
from colossal_mpi.apps.files import check_writable
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, kernels
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.pipeline import (
    SCHEDULES,
    ArraySpec,
    Instruction,
    Pipeline,
    partition,
    program,
    simulate,
    stage_grid,
)
from colossal_mpi.layout import part

Times: TypeAlias = dict[tuple[str, int, int], float]
"""Seconds by kind of computation, chunk and stage."""
_CHUNKS = 2
"""Virtual stages of the interleaved schedule."""
_WARM = 2


@dataclass(frozen=True)
class Sizes(steps.Sizes):
    """Of the model, a step and the pipeline."""

    layers: int = 8
    stages: int = 2
    microbatches: int = 4
    simulate: int = 8
    """Stages of the simulation."""

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, width {self.hidden}, {self.batch} x {self.sequence} tokens in {self.microbatches} "
            f"microbatches on {self.stages} stages"
        )


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    sizes: Sizes
    repeat: int
    json: Path | None
    plot: Path | None

    def arguments(self) -> Iterator[str]:
        """Yield the command line of the ranks."""
        for key, value in vars(self.sizes).items():
            yield from (f"--{key}", str(value))
        for key in ("repeat", "json", "plot"):
            if getattr(self, key) is not None:
                yield from (f"--{key}", str(getattr(self, key)))


def checked(sizes: Sizes, repeat: int, file: Path | None, plot: Path | None) -> Options:
    """Return the options of a command line.

    Raises
    ------
    ConfigError
        If one of them cannot be.
    """
    least = {"stages": 2, "simulate": 2, "microbatches": 1, "layers": _CHUNKS * sizes.stages}
    for field in fields(sizes):
        value, low = getattr(sizes, field.name), least.get(field.name, 1)
        if value < low:
            raise ConfigError(f"--{field.name} {value}: at least {low}, for example --{field.name} {field.default}")
    if sizes.hidden % sizes.heads:
        raise ConfigError(f"--heads {sizes.heads} do not divide --hidden {sizes.hidden}: use heads that do")
    if sizes.microbatches > sizes.batch:
        raise ConfigError(f"--microbatches {sizes.microbatches}: at most --batch, {sizes.batch}")
    if repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least one round has to run, for example --repeat 10")
    for path in (file, plot):
        check_writable(path)
    return Options(sizes, repeat, file, plot)


def main(options: Options) -> int:
    """Run the benchmark, on ranks that are started for it unless this is a job already; return an exit code."""
    if MPI.COMM_WORLD.size != options.sizes.stages:
        command = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "pipeline", *options.arguments()]
        return launch.run(options.sizes.stages, command)
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        rows, charts = _compete(options)
    if MPI.COMM_WORLD.rank == 0:
        timeline.show(f"GPT of {options.sizes}, {options.repeat} interleaved repeats", rows, options.sizes.simulate)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        if options.plot is not None:
            timeline.plot(charts, options.plot)
    return 0


class _Feed:
    """Random tokens in microbatches."""

    def __init__(self, sizes: Sizes, p: Parallelism) -> None:
        self.sizes, self.p, self.microbatches = sizes, p, sizes.microbatches
        self._ids, self._labels = sizes.sequences()
        self._loss = CrossEntropy(p)
        self.loss_backward = self._loss.backward

    def _cut(self, whole: np.ndarray, microbatch: int) -> DistArray:
        rows = slice(*part(self.sizes.batch, self.microbatches, microbatch))
        return from_global(whole[rows], self.p.grid, self.p.tokens())

    def context(self, microbatch: int) -> Context:
        return Context(microbatch=microbatch)

    def inputs(self, microbatch: int) -> DistArray:
        return self._cut(self._ids, microbatch)

    def loss(self, y: DistArray, microbatch: int) -> tuple[float, Any]:
        return self._loss.forward(y, self._cut(self._labels, microbatch), self.sizes.tokens)

    def activation_spec(self, microbatch: int) -> ArraySpec:
        first, stop = part(self.sizes.batch, self.microbatches, microbatch)
        return (stop - first, self.sizes.sequence, self.sizes.hidden), self.p.stream(), "float32"


class _Entry:
    """A schedule and its steps so far."""

    def __init__(self, schedule: str, sizes: Sizes, grid: Grid) -> None:
        self.schedule, self.grid, self.chunks = schedule, grid, _CHUNKS if SCHEDULES[schedule].interleaved else 1
        p = Parallelism(stage_grid(grid))
        config = GPTConfig(
            vocabulary=sizes.vocabulary,
            layers=sizes.layers,
            hidden=sizes.hidden,
            heads=sizes.heads,
            positions=sizes.sequence,
            tied=False,
        )
        self.pipeline = Pipeline(partition(GPT(config, p), grid, self.chunks), grid, schedule)
        self.feed = _Feed(sizes, p)
        self.steps: list[list[Bar]] = []
        """The bars of each step, of all stages; known to all ranks."""

    def turn(self) -> None:
        """Do a step and keep what every stage computed when."""
        timing.quiet_barrier()
        with ledger.record() as made:
            self.pipeline.step(self.feed)
        for parameter in self.pipeline.parameters():
            parameter.grad = None
        stage = self.grid.coords["pipe"]
        spans = [(s.kind, s.what["chunk"], s.begun, s.ended) for s in made.spans if "microbatch" in s.what]
        found = comm.collect([Bar(stage, *span) for span in spans], self.grid)
        self.steps.append([bar for bars in found for bar in bars])


def _compete(options: Options) -> tuple[list[dict[str, Any]], list[Chart]]:
    grid, sizes = Grid(None, "cpu", pipe=options.sizes.stages), options.sizes
    kernels.use("auto", grid)
    entries = [_Entry(schedule, sizes, grid) for schedule in SCHEDULES]
    for _ in range(_WARM):
        for entry in entries:
            entry.turn()
            entry.steps.clear()
    meter = Meter()
    for _ in range(options.repeat):
        for entry in entries:
            entry.turn()
    foreign = meter.foreign()
    rows, charts = [], []
    for entry in entries:
        alike = [step for other in entries if other.chunks == entry.chunks for step in other.steps]
        row, made = _row(entry, sizes, _times(alike))
        rows.append(row | {"foreign": foreign, "error": None})
        charts += made
    return rows, charts


def _row(entry: _Entry, sizes: Sizes, seconds: Times) -> tuple[dict[str, Any], list[Chart]]:
    """Return the figures of a schedule and its pictures. Times are those of all schedules with pieces as large."""
    best, shares = min(entry.steps, key=timeline.bubble), [timeline.bubble(bars) for bars in entry.steps]
    more = sizes.simulate
    again = _simulated(entry, sizes.stages, sizes.microbatches, seconds)
    many = sizes.microbatches * more // sizes.stages
    mean = {kind: statistics.mean(s for (k, *_), s in seconds.items() if k == kind) for kind in KINDS}
    alike = {(kind, chunk, stage): mean[kind] for kind, chunk, _ in seconds for stage in range(more)}
    large = _simulated(entry, more, many, alike)
    figures = {
        "schedule": entry.schedule,
        **vars(sizes),
        "repeats": len(shares),
        "bubble": min(shares),
        "median_bubble": statistics.median(shares),
        "seconds": min(map(timeline.makespan, entry.steps)),
        "median_seconds": statistics.median(map(timeline.makespan, entry.steps)),
        **{f"{kind}_seconds": value for kind, value in mean.items()},
        "simulated_bubble": timeline.bubble(again),
        "simulated_bubble_of_more": timeline.bubble(large),
    }
    title = f"{entry.schedule}, {sizes.stages} stages"
    return figures, [
        Chart(title, best),
        Chart(f"{entry.schedule}, simulated: {more} stages, {many} microbatches", large),
    ]


def _times(steps: Sequence[Sequence[Bar]]) -> Times:
    """Return the median time of each kind of computation, by chunk and stage."""
    found = defaultdict(list)
    for bar in (bar for bars in steps for bar in bars):
        found[bar.kind, bar.chunk, bar.stage].append(bar.stop - bar.start)
    return {key: statistics.median(values) for key, values in found.items()}


def _simulated(entry: _Entry, stages: int, microbatches: int, seconds: Times) -> list[Bar]:
    kinds = dict(zip(("Forward", "BackwardInput", "BackwardWeight"), KINDS, strict=True))

    def cost(step: Instruction, stage: int) -> float:
        return seconds[kinds[type(step).__name__], step.chunk, stage]

    programs = [list(program(entry.schedule, stages, microbatches, stage, entry.chunks)) for stage in range(stages)]
    spans = simulate(programs, cost)
    return [Bar(s.stage, kinds[type(s.instruction).__name__], s.instruction.chunk, s.start, s.stop) for s in spans]


@dataclass(frozen=True, kw_only=True)
class PipelineCommand(Command):
    """Measure how long the stages of a GPT wait under every pipeline schedule.

    A simulation with the measured times shows more stages.
    """

    example = "colossal-mpi bench pipeline --microbatches 8 --plot pipeline.png"

    stages: Annotated[int, typer.Option(help="Ranks, one stage each.")] = 2
    microbatches: Annotated[int, typer.Option(help="Microbatches of a step.")] = 4
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 8
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 256
    simulate: Annotated[int, typer.Option(help="Stages of the simulation.")] = 8
    repeat: Annotated[int, typer.Option(help="Rounds of all schedules.")] = 10
    json: JsonFile = None
    plot: Annotated[Path | None, typer.Option(help="Draw what the stages do when to this file (PNG, PDF, SVG).")] = None

    def run(self) -> int:
        sizes = Sizes(
            self.layers,
            self.hidden,
            self.heads,
            self.sequence,
            self.batch,
            self.vocabulary,
            self.stages,
            self.microbatches,
            self.simulate,
        )
        return main(checked(sizes, self.repeat, self.json, self.plot))
