"""Plans and forecasts at a terminal: tables, the timeline of the microbatches, and the shares of a step's time.

The commands of this package print them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colossal_mpi.apps.planning.forecast import Forecast, checkpoint_copies
from colossal_mpi.apps.planning.search import USABLE, Plan
from colossal_mpi.apps.text import binary, duration, si
from colossal_mpi.layers.pipeline import BackwardInput, BackwardWeight, Forward, Interval, makespan

_LEFT = ("grid", "mode", "why")
_WIDTH = 150
"""Columns of the widest table."""
_TIMELINE = 100
"""Columns of the timeline."""
_STYLES = {Forward: "black on bright_blue", BackwardInput: "black on green", BackwardWeight: "black on yellow"}
_FIRST = {Forward: "1", BackwardInput: "a", BackwardWeight: "A"}
"""The sign of the first microbatch; the following microbatches have the following signs."""


@dataclass(frozen=True)
class TimeShares:
    """The shares of a step's time on the busiest stage, in seconds."""

    computing: float
    communicating: float
    """Communication that no computation hides."""
    waiting: float
    """Waiting for other stages."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computing + self.communicating + self.waiting


def time_shares(one: Forecast) -> TimeShares:
    """Return the shares of a step's time."""
    stage = max(one.stages, key=lambda cost: cost.busy)
    return TimeShares(stage.busy - stage.communicating, stage.communicating, max(0.0, one.seconds - stage.busy))


def why_slower(one: Forecast, best: Forecast) -> str:
    """Return by how much a configuration is slower than the best one, and the main reason."""
    own, other = time_shares(one), time_shares(best)
    losses = {name: getattr(own, name) - getattr(other, name) for name in vars(own)}
    name, most = max(losses.items(), key=lambda pair: pair[1])
    if most <= 0:
        return "as fast"
    reasons = {
        "computing": "more to compute",
        "communicating": f"more to move{_over_axes(one)}",
        "waiting": "more waiting for stages",
    }
    return f"+{duration(most)}, {reasons[name]}"


def _over_axes(one: Forecast) -> str:
    """Name the group of axes over which communication takes longest."""
    sums: dict[str, float] = {}
    for cost in one.stages:
        for axis, seconds in cost.seconds_by_axis.items():
            sums[axis] = max(sums.get(axis, 0.0), seconds)
    return f" over {max(sums, key=lambda axis: sums[axis])}" if sums else ""


def show_plan(plan: Plan, measured: Sequence[float], memory: float, source: str, settings: Sequence[str] = ()) -> None:
    """Print a plan: the table, the extent of the search, and the fastest configuration with the command to start it.

    Parameters
    ----------
    plan : Plan
        The result of the search.
    measured : sequence of float
        Seconds of a step of each configuration that was tried.
    memory : float
        Bytes of memory of a rank.
    source : str
        The configuration's file or name, as the command repeats it.
    settings : sequence of str
        Settings ``section.key=value``, as the command repeats them.
    """
    out = console()
    if plan.best:
        out.print(plan_table(plan.best, measured))
    for line in explained(plan, memory, source, settings):
        out.print(line)


def plan_table(best: Sequence[Forecast], measured: Sequence[float] = ()) -> Table:
    """Return a row for each forecast, the fastest first, with the reason why each other one is slower."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ["step", *(["measured"] if measured else []), "grid", "mode", "memory", "words", "messages", "waits", "why"]
    for name in names:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=name != "why")
    for i, one in enumerate(best):
        seconds = [duration(measured[i])] if measured else []
        figures = (binary(one.peak), f"{one.words:,}", f"{one.messages:,}", f"{100 * one.bubble:.0f} %")
        why = why_slower(one, best[0]) if i else "the fastest"
        table.add_row(duration(one.seconds), *seconds, grid_text(one), mode_text(one), *figures, why)
    return table


def grid_text(one: Forecast) -> str:
    """Return the axes of a grid as the option ``--grid`` takes them."""
    return ",".join(f"{axis}={size}" for axis, size in one.config.parallel.grid.items())


def mode_text(one: Forecast) -> str:
    """Return the choices of a configuration besides its grid."""
    parallel, training = one.config.parallel, one.config.training
    return " ".join(
        [
            parallel.tensor,
            *([f"zero={parallel.zero}"] if parallel.zero else []),
            *([f"recompute={parallel.recompute}"] if parallel.recompute != "none" else []),
            *([f"{parallel.schedule}"] if "pipe" in parallel.grid else []),
            *([f"x{training.microbatches}"] if training.microbatches > 1 else []),
        ]
    )


def train_command(one: Forecast, source: str, settings: Sequence[str] = ()) -> str:
    """Return the command that trains with a forecast's configuration, and with the settings of the plan."""
    parallel, training = one.config.parallel, one.config.training
    keys: dict[str, Any] = {
        "parallel.zero": parallel.zero,
        "parallel.recompute": parallel.recompute,
        "training.microbatches": training.microbatches,
    }
    if "pipe" in parallel.grid:
        keys |= {"parallel.schedule": parallel.schedule, "parallel.virtual_stages": parallel.virtual_stages}
    chosen = [*settings, *(f"{key}={value}" for key, value in keys.items())]
    words = ["mpiexec", "-n", str(one.ranks), "colossal-mpi", "train", source, "--grid", grid_text(one)]
    words += ["--tensor", parallel.tensor, *(word for setting in chosen for word in ("--set", setting))]
    return shlex.join(words)


def explained(plan: Plan, memory: float, source: str, settings: Sequence[str] = ()) -> list[str]:
    """Return the lines below the table: the extent of the search, and the fastest configuration, if there is one.

    Parameters
    ----------
    plan : Plan
        The result of the search.
    memory : float
        Bytes of memory of a rank.
    source : str
        The configuration's file or name, as the command repeats it.
    settings : sequence of str
        Settings ``section.key=value``, as the command repeats them.

    Returns
    -------
    list of str
        The lines.
    """
    searched = f"looked at {plan.grids} grids and modes, {plan.estimated:,} ways to run on them"
    if not plan.estimated:
        return [f"{searched}: the model cannot fill so many ranks: take fewer, or a larger training.batch"]
    if not plan.best:
        return [
            f"{searched}: none fits into {USABLE:.0%} of {binary(memory)}; the least that a rank needs is "
            f"{binary(plan.smallest)}: take more ranks, a smaller training.batch or model.context, or 16-bit floats"
        ]
    best, parts = plan.best[0], time_shares(plan.best[0])
    cut = ", sequences cut as well" if plan.sequences else ""
    unfit = f"; on {plan.unfit} the memory is too small" if plan.unfit else ""
    computing, moving, waiting = (f"{100 * part / parts.total:.0f} %" for part in vars(parts).values())
    return [
        f"{searched}{cut}{unfit}",
        f"the fastest, {grid_text(best)} {mode_text(best)}: {duration(best.seconds)} a step, of which {computing} go "
        f"into computing, {moving} into communication that nothing hides, {waiting} into waiting for other stages",
        f"$ {train_command(best, source, settings)}",
    ]


def show_forecast(one: Forecast) -> None:
    """Print the cost of a step on each stage, and the timeline of the stages."""
    out = console()
    out.print(f"{one.ranks} ranks, {grid_text(one)}, {mode_text(one)}: the first rank of each stage")
    out.print(memory_table(one))
    out.print("copies: of the state, in host memory, for checkpoints in the background; not in the peak")
    out.print(traffic_table(one))
    if one.config.data.documents == "separate":
        out.print("documents are kept apart: figures of the first step; in a ring, words depend on a batch's documents")
    if len(one.stages) > 1 or one.config.training.microbatches > 1:
        out.print("microbatches, by stage: 1 2 3 forward, a b c backward (inputs), A B C backward (weights)")
        for line in timeline(one.spans, len(one.stages)):
            out.print(line)
    out.print(f"a step {duration(one.seconds)}, of which {100 * one.bubble:.0f} % of the schedule waiting for stages")


def memory_table(one: Forecast) -> Table:
    """Return the memory of a rank of each stage. Copies for checkpoints are in host memory and not in the peak."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ("stage", "weights", "gradients", "optimizer", "a microbatch", "kept at once", "peak", "copies", "flop")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for i, (cost, copied) in enumerate(zip(one.stages, checkpoint_copies(one.config), strict=True)):
        run = cost.run
        sizes = [binary(size) for size in (run.weights, run.gradients, run.state, run.saved)]
        table.add_row(str(i), *sizes, f"{cost.live:g}", binary(cost.peak), binary(copied), si(run.flops, "flop"))
    return table


def traffic_table(one: Forecast) -> Table:
    """Return the words that a rank of each stage receives over each group of axes."""
    axes = list(dict.fromkeys(axis for cost in one.stages for axis in cost.words_by_axis))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("stage", "messages", "words", *(f"over {axis}" for axis in axes)):
        table.add_column(name, justify="right", no_wrap=True)
    for i, cost in enumerate(one.stages):
        words = (f"{cost.words_by_axis.get(axis, 0):,}" for axis in axes)
        table.add_row(str(i), f"{cost.messages:,}", f"{cost.words:,}", *words)
    return table


def timeline(spans: Sequence[Interval], stages: int) -> list[Text]:
    """Return a line for each stage: the microbatch that it computes, from the left to the right."""
    scale = _TIMELINE / makespan(spans)
    lines = [[(" ", "")] * _TIMELINE for _ in range(stages)]
    for span in spans:
        first, last = round(span.start * scale), max(round(span.stop * scale), round(span.start * scale) + 1)
        sign = chr(
            ord(_FIRST[type(span.instruction)]) + span.instruction.microbatch % 9
        )  # the tenth has the first one's sign
        for at in range(first, min(last, _TIMELINE)):
            lines[span.stage][at] = (sign, _STYLES[type(span.instruction)])
    return [Text.assemble(f"{i:>3} ", *line) for i, line in enumerate(lines)]


def console() -> Console:
    """Return a console that is wide enough for the tables."""
    found = Console(markup=False, soft_wrap=True, highlight=False)
    found.width = max(found.width, _WIDTH)
    return found
