"""``colossal-mpi plan``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from colossal_mpi.apps.config import Config, load
from colossal_mpi.apps.files import check_writable
from colossal_mpi.apps.planning import show
from colossal_mpi.apps.planning.forecast import Forecast
from colossal_mpi.apps.planning.rates import Given, about, machine_of, size_of
from colossal_mpi.apps.planning.search import Plan, search
from colossal_mpi.apps.planning.trial import trial
from colossal_mpi.apps.planning.why import shares
from colossal_mpi.apps.training import tasks
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.meta.machine import Machine


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    source: str
    settings: list[str]
    config: Config
    ranks: int
    memory: float
    given: Given
    count: int
    rounds: int
    json: Path | None


def checked(
    source: str,
    settings: list[str],
    ranks: int | None,
    memory: str | None,
    given: Given,
    count: int,
    rounds: int,
    file: Path | None,
) -> Options:
    """Return the options of a command line.

    Raises
    ------
    ConfigError
        If one of them cannot be.
    """
    world = world_size()
    ranks = world if ranks is None else ranks
    for name, value, least in (("--ranks", ranks, 1), ("--show", count, 1), ("--try", rounds, 0)):
        if value < least:
            raise ConfigError(f"plan: {name} {value}: at least {least}")
    if rounds and ranks != world:
        raise ConfigError(f"plan: --try does steps on {ranks} ranks and this job has {world}: mpiexec -n {ranks}")
    check_writable(file)
    limit = math.inf if memory is None else size_of(memory)
    return Options(source, settings, tasks.complete(load(source, settings)), ranks, limit, given, count, rounds, file)


def main(options: Options) -> int:
    """Look for the best ways to run and show them, on rank 0; return an exit code, 1 if there is none.

    The ranks of the job share the search out, whatever the number of ranks that are planned for.
    """
    machine, origin = machine_of(options.config, options.ranks, options.given)
    grid = Grid(None, "cpu", ranks=world_size())
    if grid.rank == 0:
        show.console().print(f"a rank: {about(machine)} ({origin})", markup=False)
    plan = _searched(options, machine, grid)
    configs = [one.config for one in plan.best]
    measured = trial(configs, options.rounds) if options.rounds else []
    if grid.rank == 0:
        show.plan(plan, measured, options.memory, options.source, options.settings)
        if options.json is not None:
            rows = [_row(one, measured[i : i + 1]) for i, one in enumerate(plan.best)]
            options.json.write_text(json.dumps({"machine": asdict(machine), "ways": rows}, indent=1) + "\n")
    return 0 if configs else 1


def _searched(options: Options, machine: Machine, grid: Grid) -> Plan:
    """Return what the search finds, with a bar at a terminal of rank 0."""
    console = Console(stderr=True)
    columns = (TextColumn("pricing grids"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=grid.rank > 0 or not console.is_terminal) as bar:
        task = bar.add_task("pricing", total=None)
        return search(
            options.config,
            options.ranks,
            machine,
            options.memory,
            options.count,
            grid,
            lambda done, of: bar.update(task, completed=done, total=of),
        )


def _row(one: Forecast, measured: Sequence[float]) -> dict[str, Any]:
    """Return a way to run for programs: seconds, bytes, array elements."""
    parallel = one.config.parallel
    return {
        "grid": parallel.grid,
        **{key: getattr(parallel, key) for key in ("tensor", "zero", "recompute", "schedule", "virtual_stages")},
        "microbatches": one.config.training.microbatches,
        "seconds": one.seconds,
        **dict(zip(["measured"], measured, strict=False)),
        **asdict(shares(one)),
        "words": one.words,
        "messages": one.messages,
        "memory": one.peak,
        "bubble": one.bubble,
    }
