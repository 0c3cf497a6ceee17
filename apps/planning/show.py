"""Plans and forecasts for the eye."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps.planning.forecast import Forecast
from colossal_mpi.apps.planning.search import USABLE, Plan
from colossal_mpi.apps.planning.why import against, shares
from colossal_mpi.apps.text import binary, duration

_LEFT = ("grid", "mode", "why")
_WIDTH = 150
"""Columns of the widest table."""


def table(best: Sequence[Forecast], measured: Sequence[float] = ()) -> Table:
    """Return ways to run as rows, the first of which the others are compared with."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ["step", *(["measured"] if measured else []), "grid", "mode", "memory", "words", "messages", "waits", "why"]
    for name in names:
        made.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=name != "why")
    for i, one in enumerate(best):
        taken = [duration(measured[i])] if measured else []
        figures = (binary(one.peak), f"{one.words:,}", f"{one.messages:,}", f"{100 * one.bubble:.0f} %")
        why = against(one, best[0]) if i else "the fastest"
        made.add_row(duration(one.seconds), *taken, grid_of(one), mode_of(one), *figures, why)
    return made


def grid_of(one: Forecast) -> str:
    """Return the axes as ``--grid`` takes them."""
    return ",".join(f"{axis}={size}" for axis, size in one.config.parallel.grid.items())


def mode_of(one: Forecast) -> str:
    """Return what is chosen besides the grid."""
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


def command(one: Forecast, source: str, settings: Sequence[str] = ()) -> str:
    """Return the command that trains so, with the settings that were planned with."""
    parallel, training = one.config.parallel, one.config.training
    keys: dict[str, Any] = {
        "parallel.zero": parallel.zero,
        "parallel.recompute": parallel.recompute,
        "training.microbatches": training.microbatches,
    }
    if "pipe" in parallel.grid:
        keys |= {"parallel.schedule": parallel.schedule, "parallel.virtual_stages": parallel.virtual_stages}
    chosen = [*settings, *(f"{key}={value}" for key, value in keys.items())]
    words = ["mpiexec", "-n", str(one.ranks), "colossal-mpi", "train", source, "--grid", grid_of(one)]
    words += ["--tensor", parallel.tensor, *(word for setting in chosen for word in ("--set", setting))]
    return shlex.join(words)


def explained(plan: Plan, memory: float, source: str, settings: Sequence[str] = ()) -> list[str]:
    """Return what the best way to run is, what its time goes into, and how to start it."""
    looked = f"{plan.grids} grids and modes, {plan.priced:,} ways to run on them"
    if not plan.priced:
        return [f"looked at {looked}: the model cannot fill so many ranks: take fewer, or a larger training.batch"]
    if not plan.best:
        return [
            f"looked at {looked}: none fits into {USABLE:.0%} of {binary(memory)}; the least that a rank needs is "
            f"{binary(plan.smallest)}: take more ranks, a smaller training.batch or model.context, or 16-bit floats"
        ]
    best, parts = plan.best[0], shares(plan.best[0])
    cut = ", sequences cut as well" if plan.sequences else ""
    unfit = f"; on {plan.unfit} the memory is too small" if plan.unfit else ""
    computing, moving, waiting = (_percent(part, parts.total) for part in vars(parts).values())
    return [
        f"looked at {looked}{cut}{unfit}",
        f"the fastest, {grid_of(best)} {mode_of(best)}: {duration(best.seconds)} a step, of which {computing} go into "
        f"computing, {moving} into communication that nothing hides, {waiting} into waiting for other stages",
        f"$ {command(best, source, settings)}",
    ]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def plan(found: Plan, measured: Sequence[float], memory: float, source: str, settings: Sequence[str] = ()) -> None:
    """Print what a search has found."""
    out = console()
    if found.best:
        out.print(table(found.best, measured))
    for line in explained(found, memory, source, settings):
        out.print(line, markup=False)


def console() -> Console:
    """Return a console wide enough for the tables."""
    found = Console(soft_wrap=True, highlight=False)
    found.width = max(found.width, _WIDTH)
    return found
