"""``colossal-mpi bench pipeline``: measure how long the stages of a pipeline wait under every schedule.

The bubble is the share of the ranks' time, from the first computation of a step to the last one, in which they compute
nothing. `Pipeline` measures it for each schedule, and simulates each schedule with the measured times of forward, input
and weight parts, on as many stages and on more.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from colossal_mpi import comm, ledger
from colossal_mpi.apps.bench import harness, timing
from colossal_mpi.apps.bench.gpt import GPTBenchmark, Tokens
from colossal_mpi.apps.bench.harness import Column, Competitor, Row, number
from colossal_mpi.apps.command import JsonFile
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, CrossEntropy, Parallelism, kernels
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.pipeline import SCHEDULES, ArraySpec, Instruction, partition, program, simulate, stage_grid
from colossal_mpi.layers.pipeline import Pipeline as PipelinedModel
from colossal_mpi.layout import part

Times: TypeAlias = dict[tuple[str, int, int], float]
"""Seconds by kind of computation, chunk and stage."""
KINDS = {"Forward": "forward", "BackwardInput": "backward", "BackwardWeight": "weight"}
"""Kinds of computation by the name of their instruction."""
_COLORS = {"forward": "#7fa7d0", "backward": "#2e8b57", "weight": "#e0a030"}
_CHUNKS = 2  # virtual stages of an interleaved schedule
_TOLERANCE = 1e-5  # relative difference of the loss between schedules, in float32


@dataclass(frozen=True)
class Bar:
    """A computation of a stage; times in seconds."""

    stage: int
    kind: str
    chunk: int
    start: float
    stop: float


def makespan(bars: Sequence[Bar]) -> float:
    """Return the seconds from the first start to the last stop."""
    return max(bar.stop for bar in bars) - min(bar.start for bar in bars)


def bubble(bars: Sequence[Bar]) -> float:
    """Return the share of the stages' time in which they compute nothing."""
    stages = len({bar.stage for bar in bars})
    return 1 - sum(bar.stop - bar.start for bar in bars) / (stages * makespan(bars))


@dataclass(frozen=True, kw_only=True)
class Pipeline(GPTBenchmark):
    """Measure how long the stages of a GPT wait under every pipeline schedule.

    A simulation with the measured times shows more stages.
    """

    name = "pipeline"
    example = "colossal-mpi bench pipeline --microbatches 8 --plot pipeline.png"

    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 8
    stages: Annotated[int, typer.Option(help="Ranks, one stage each.")] = 2
    microbatches: Annotated[int, typer.Option(help="Microbatches of a step.")] = 4
    simulate: Annotated[int, typer.Option(help="Stages of the simulation.")] = 8
    repeat: Annotated[int, typer.Option(help="Rounds of all schedules.")] = 10
    json: JsonFile = None
    plot: Annotated[Path | None, typer.Option(help="Draw what the stages do when (PNG, PDF, SVG).")] = None

    def __post_init__(self) -> None:
        self.check_sizes(stages=2, simulate=2, microbatches=1, layers=_CHUNKS * self.stages)
        if self.microbatches > self.batch:
            raise ConfigError(f"--microbatches {self.microbatches}: at most --batch, {self.batch}")
        harness.check_common(self, self.repeat, 10)

    @property
    def job_size(self) -> int:
        return self.stages

    def measure(self) -> Iterator[list[Row]]:
        grid = Grid(None, "cpu", pipe=self.stages)
        kernels.use("auto", grid)
        entries = [Schedule(name, self, grid) for name in SCHEDULES]
        for one in entries[1:]:
            one.base = entries[0]
        foreign = harness.compete(entries, self.repeat)
        rows = []
        for one in entries:
            alike = [step for other in entries if other.chunks == one.chunks for step in other.steps]
            rows.append(self._row(one, median_times(alike)) | {"foreign": foreign})
        yield rows

    def _row(self, one: Schedule, seconds: Times) -> Row:
        """Return the result of a schedule. The times come from all schedules with equal chunks."""
        given = {**self.sizes, "stages": self.stages, "microbatches": self.microbatches, "simulate": self.simulate}
        row = {"schedule": one.name, **given, **one.figures()}
        if not one.timed:
            return row
        stages, more = self.stages, self.simulate
        many = self.microbatches * more // stages
        same = simulated(one, stages, self.microbatches, seconds)
        mean = {kind: statistics.mean(s for (k, *_), s in seconds.items() if k == kind) for kind in KINDS.values()}
        alike = {(kind, chunk, stage): mean[kind] for kind, chunk, _ in seconds for stage in range(more)}
        large = simulated(one, more, many, alike)
        shares = [bubble(bars) for bars in one.steps]
        return row | {
            "bubble": min(shares),
            "median_bubble": statistics.median(shares),
            **{f"{kind}_seconds": value for kind, value in mean.items()},
            "simulated_bubble": bubble(same),
            "simulated_bubble_of_more": bubble(large),
            "_charts": {
                f"{one.name}, {stages} stages": min(one.steps, key=bubble),
                f"{one.name}, simulated: {more} stages, {many} microbatches": large,
            },
        }

    def draw(self, rows: list[Row], path: Path) -> None:
        draw({title: bars for row in rows for title, bars in row.get("_charts", {}).items()}, path)

    def show(self, rows: list[Row]) -> None:
        shares = {"bubble": "bubble", "median_bubble": "median", "simulated_bubble": "simulated"}
        shares["simulated_bubble_of_more"] = f"of {self.simulate} stages"
        columns = [
            Column("schedule", lambda row: str(row["schedule"]), left=True),
            *(number(title, key, ".1f", scale=100, unit=" %") for key, title in shares.items()),
            number("best s", "seconds", ".4f"),
            number("median s", "median_seconds", ".4f"),
            *(number(f"{kind} ms", f"{kind}_seconds", ".2f", scale=1e3) for kind in KINDS.values()),
        ]
        sizes = f"{self.layers} layers, width {self.hidden}, {self.batch} x {self.sequence} tokens"
        job = f"in {self.microbatches} microbatches on {self.stages} stages, {self.repeat} interleaved repeats"
        notes = [
            "bubble: the share of the ranks' time, from the first computation to the last, in which they wait;",
            "simulated: with the measured times, and messages that take none",
        ]
        harness.show(f"GPT of {sizes} {job}", columns, rows, notes)


class _Microbatches:
    """Random tokens in microbatches, from which the pipeline takes inputs, labels and losses."""

    def __init__(self, options: Pipeline, p: Parallelism) -> None:
        self.options, self.p, self.microbatches = options, p, options.microbatches
        self._ids, self._labels = options.sequences()
        self._loss = CrossEntropy(p)
        self.loss_backward = self._loss.backward

    def _cut(self, whole: Tokens, microbatch: int) -> DistArray:
        rows = slice(*part(self.options.batch, self.microbatches, microbatch))
        return from_global(whole[rows], self.p.grid, self.p.tokens())

    def context(self, microbatch: int) -> Context:
        return Context()

    def inputs(self, microbatch: int) -> DistArray:
        return self._cut(self._ids, microbatch)

    def loss(self, y: DistArray, microbatch: int) -> tuple[float, Any]:
        return self._loss.forward(y, self._cut(self._labels, microbatch), self.options.tokens)

    def activation_spec(self, microbatch: int) -> ArraySpec:
        first, stop = part(self.options.batch, self.microbatches, microbatch)
        return (stop - first, self.options.sequence, self.options.hidden), self.p.stream(), "float32"


class Schedule(Competitor):
    """A schedule as a competitor. A step lasts from its first computation to its last one.

    Attributes
    ----------
    steps : list of list of Bar
        The computations of each stage and their times, for each step; the same on all ranks.
    base : Schedule or None
        The competitor whose loss it must have.
    """

    warm_up = 2

    def __init__(self, name: str, options: Pipeline, grid: Grid) -> None:
        super().__init__(name, grid.comm(("pipe",)), grid.size)
        self.grid, self.chunks = grid, _CHUNKS if SCHEDULES[name].interleaved else 1
        p = Parallelism(stage_grid(grid))
        chunks = partition(GPT(options.model(tied=False), p), grid, self.chunks)
        self.pipeline, self.feed = PipelinedModel(chunks, grid, name), _Microbatches(options, p)
        self.steps: list[list[Bar]] = []
        self.base: Schedule | None = None
        self.loss = math.nan

    def run(self) -> float:
        timing.quiet_barrier()
        with ledger.record() as recorded:
            self.loss = self.pipeline.step(self.feed)
        for parameter in self.pipeline.parameters():
            parameter.grad = None
        stage = self.grid.coords["pipe"]
        spans = [(s.kind, s.what["chunk"], s.begun, s.ended) for s in recorded.spans if "microbatch" in s.what]
        found = comm.collect([Bar(stage, *span) for span in spans], self.grid)
        self.steps.append([bar for bars in found for bar in bars])
        return makespan(self.steps[-1])

    def check(self) -> str | None:
        self.steps.clear()  # forget the warm-up
        exact = self.loss if self.base is None else self.base.loss
        if abs(self.loss - exact) <= _TOLERANCE * abs(exact):
            return None
        return f"wrong: its loss is {self.loss:.7g} and {exact:.7g} with another schedule"


def median_times(steps: Sequence[Sequence[Bar]]) -> Times:
    """Return the median time of each kind of computation, by chunk and stage."""
    found = defaultdict(list)
    for bar in (bar for bars in steps for bar in bars):
        found[bar.kind, bar.chunk, bar.stage].append(bar.stop - bar.start)
    return {key: statistics.median(values) for key, values in found.items()}


def simulated(one: Schedule, stages: int, microbatches: int, seconds: Times) -> list[Bar]:
    """Return the computations of the stages in a simulation with these times, in which messages take no time."""

    def cost(step: Instruction, stage: int) -> float:
        return seconds[KINDS[type(step).__name__], step.chunk, stage]

    programs = [list(program(one.name, stages, microbatches, stage, one.chunks)) for stage in range(stages)]
    intervals = simulate(programs, cost)
    return [Bar(s.stage, KINDS[type(s.instruction).__name__], s.instruction.chunk, s.start, s.stop) for s in intervals]


def draw(charts: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """Draw the computations of all stages over time, with two charts in a row.

    Parameters
    ----------
    charts : mapping of str to sequence of Bar
        The computations of each chart by its title.
    path : Path
        PNG, PDF or SVG file.
    """
    down = -(-len(charts) // 2)
    with harness.figure(path, down, 2, (12, 1 + 1.8 * down)) as (figure, panels):
        from matplotlib.patches import Patch

        for axes, (title, bars) in zip(panels.flat, charts.items(), strict=False):
            start = min(bar.start for bar in bars)
            for bar in bars:
                left, width = 1e3 * (bar.start - start), 1e3 * (bar.stop - bar.start)
                shade = 1.0 if bar.chunk == 0 else 0.6
                axes.barh(bar.stage, width, 0.85, left, color=_COLORS[bar.kind], alpha=shade, ec="white", lw=0.4)
            axes.set(yticks=range(max(bar.stage for bar in bars) + 1), xlim=(0, 1e3 * makespan(bars)))
            axes.set_title(f"{title}: bubble {100 * bubble(bars):.1f} %", size=9)
            axes.tick_params(labelsize=7)
            axes.invert_yaxis()
        for axes in panels[-1]:
            axes.set_xlabel("ms", size=8)
        patches = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
