"""``colossal-mpi train --dry-run``: what each rank would need, receive and do in a step, without starting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.candidates import with_settings
from colossal_mpi.apps.planning.forecast import Forecast, copies, forecast
from colossal_mpi.apps.planning.rates import Given, about, machine_of
from colossal_mpi.apps.planning.show import console, grid_of, mode_of
from colossal_mpi.apps.text import binary, duration, si
from colossal_mpi.grid import world_rank, world_size
from colossal_mpi.layers.pipeline import BackwardInput, BackwardWeight, Forward, Interval, makespan

_COLUMNS = 100
"""Of the timeline."""
_STYLES = {Forward: "black on bright_blue", BackwardInput: "black on green", BackwardWeight: "black on yellow"}
_FIRST = {Forward: "1", BackwardInput: "a", BackwardWeight: "A"}
"""The sign of the first microbatch; what follows has the next ones."""


def main(config: Config) -> None:
    """Print the forecast of a run; on rank 0 of a job."""
    if not config.parallel.grid:
        config = with_settings(config, {"data": world_size()}, config.parallel.tensor)
    machine, origin = machine_of(config, math.prod(config.parallel.grid.values()), Given())
    if world_rank() == 0:
        show(forecast(config, machine))
        console().print(f"on ranks of {about(machine)} ({origin})", markup=False)


def show(one: Forecast) -> None:
    """Print what a step takes of each stage, and when each computes what."""
    out = console()
    out.print(f"{one.ranks} ranks, {grid_of(one)}, {mode_of(one)}: the first rank of each stage", markup=False)
    out.print(memory(one))
    out.print("copies: of the state, in host memory, for checkpoints in the background; not in the peak")
    out.print(traffic(one))
    if len(one.stages) > 1 or one.config.training.microbatches > 1:
        out.print("microbatches, by stage: 1 2 3 forward, a b c backward (inputs), A B C backward (weights)")
        for line in timeline(one.spans, len(one.stages)):
            out.print(line)
    out.print(f"a step {duration(one.seconds)}, of which {100 * one.bubble:.0f} % of the schedule waiting for stages")


def memory(one: Forecast) -> Table:
    """Return the memory of a rank of each stage; copies for checkpoints are in host memory, and not in the peak."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ("stage", "weights", "gradients", "optimizer", "a microbatch", "kept at once", "peak", "copies", "flop")
    for name in names:
        made.add_column(name, justify="right", no_wrap=True)
    for i, (cost, copied) in enumerate(zip(one.stages, copies(one.config), strict=True)):
        run = cost.run
        sizes = [binary(size) for size in (run.weights, run.gradients, run.state, run.saved)]
        made.add_row(str(i), *sizes, f"{cost.live:g}", binary(cost.peak), binary(copied), si(run.flops, "flop"))
    return made


def traffic(one: Forecast) -> Table:
    """Return the words that a rank of each stage receives over each group of axes."""
    axes = list(dict.fromkeys(axis for cost in one.stages for axis in cost.words_by_axis))
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("stage", "messages", "words", *(f"over {axis}" for axis in axes)):
        made.add_column(name, justify="right", no_wrap=True)
    for i, cost in enumerate(one.stages):
        each = (f"{cost.words_by_axis.get(axis, 0):,}" for axis in axes)
        made.add_row(str(i), f"{cost.messages:,}", f"{cost.words:,}", *each)
    return made


def timeline(spans: Sequence[Interval], stages: int) -> list[Text]:
    """Return a line for each stage: which microbatch it computes what of, from the left to the right."""
    scale = _COLUMNS / makespan(spans)
    lines = [[(" ", "")] * _COLUMNS for _ in range(stages)]
    for span in spans:
        first, last = round(span.start * scale), max(round(span.stop * scale), round(span.start * scale) + 1)
        for at in range(first, min(last, _COLUMNS)):
            lines[span.stage][at] = (_sign(span), _STYLES[type(span.instruction)])
    return [Text.assemble(f"{i:>3} ", *line) for i, line in enumerate(lines)]


def _sign(span: Interval) -> str:
    """Return the sign of a computation: that of its microbatch, again from the first one after nine."""
    return chr(ord(_FIRST[type(span.instruction)]) + span.instruction.microbatch % 9)
