"""The work of ``colossal-mpi plan`` and ``colossal-mpi train --dry-run``, and the forecast beside a run's measurements.

``apps.cli`` calls these functions. They find the machine (`machine`), search (`search`) or forecast (`forecast`), and
print (`report`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from colossal_mpi import comm
from colossal_mpi.apps.config import Config, load
from colossal_mpi.apps.files import check_writable, write_result
from colossal_mpi.apps.planning import report
from colossal_mpi.apps.planning.candidates import with_settings
from colossal_mpi.apps.planning.forecast import Forecast, forecast
from colossal_mpi.apps.planning.machine import GivenRates, about, bytes_of, calibrate, machine_of
from colossal_mpi.apps.planning.search import Plan, search
from colossal_mpi.apps.training import Trainer, tasks
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_rank, world_size
from colossal_mpi.machine import Machine, measure

_WARM_UP = 2
"""Steps before the measured ones: the first step makes weights and plans."""


@dataclass(frozen=True)
class PlanOptions:
    """The checked options of ``colossal-mpi plan``.

    Parameters
    ----------
    source : str
        The configuration's file, or the name of one that comes with the package.
    settings : list of str
        Settings ``section.key=value``.
    config : Config
        The configuration with these settings.
    ranks : int
        Ranks to plan for.
    memory : float
        Bytes of memory of a rank.
    given : GivenRates
        The user's rates of the machine.
    count : int
        Configurations to show.
    rounds : int
        Steps of each of them to measure; 0 for none.
    json : Path, optional
        The file for the rows.
    """

    source: str
    settings: list[str]
    config: Config
    ranks: int
    memory: float
    given: GivenRates
    count: int
    rounds: int
    json: Path | None


def checked_options(
    source: str,
    settings: list[str],
    ranks: int | None,
    memory: str | None,
    given: GivenRates,
    count: int,
    rounds: int,
    file: Path | None,
) -> PlanOptions:
    """Return the options of ``colossal-mpi plan``, or refuse them before the work begins.

    Parameters
    ----------
    source : str
        The configuration's file, or the name of one that comes with the package.
    settings : list of str
        Settings ``section.key=value``.
    ranks : int, optional
        Ranks to plan for; by default the ranks of this job.
    memory : str, optional
        Memory of a rank, such as ``80GiB``; by default there is no limit.
    given : GivenRates
        The user's rates of the machine.
    count : int
        Configurations to show.
    rounds : int
        Steps of each of them to measure; 0 for none.
    file : Path, optional
        The file for the rows.

    Returns
    -------
    PlanOptions
        The options.

    Raises
    ------
    ConfigError
        If a number is too small, the memory is not a size, the configuration is wrong, the file cannot be written, or
        steps are to be measured on another number of ranks than the job has.
    """
    world = world_size()
    ranks = world if ranks is None else ranks
    for name, value, least in (("--ranks", ranks, 1), ("--show", count, 1), ("--try", rounds, 0)):
        if value < least:
            raise ConfigError(f"plan: {name} {value}: at least {least}")
    if rounds and ranks != world:
        raise ConfigError(f"plan: --try does steps on {ranks} ranks and this job has {world}: mpiexec -n {ranks}")
    check_writable(file)
    limit = math.inf if memory is None else bytes_of(memory)
    config = tasks.complete(load(source, settings))
    return PlanOptions(source, settings, config, ranks, limit, given, count, rounds, file)


def plan(options: PlanOptions) -> int:
    """Find the best configurations and print them on rank 0.

    The ranks of the job share the search, whatever the number of ranks that they plan for.

    Parameters
    ----------
    options : PlanOptions
        The checked options.

    Returns
    -------
    int
        An exit code: 0, or 1 if nothing was found.

    Notes
    -----
    **Communication:** the messages of `colossal_mpi.machine.measure`, gathers of estimates and forecasts, and the
    measured steps.
    """
    machine, origin = machine_of(options.config, options.ranks, options.given)
    grid = Grid(None, "cpu", ranks=world_size())
    if grid.rank == 0:
        report.console().print(f"a rank: {about(machine)} ({origin})")
    found = _search_with_bar(options, machine, grid)
    configs = [one.config for one in found.best]
    measured = time_steps(configs, options.rounds) if options.rounds else []
    if grid.rank == 0:
        report.show_plan(found, measured, options.memory, options.source, options.settings)
        if options.json is not None:
            rows = [_row(one, measured[i : i + 1]) for i, one in enumerate(found.best)]
            write_result(options.json, json.dumps({"machine": asdict(machine), "ways": rows}, indent=1) + "\n")
    return 0 if configs else 1


def _search_with_bar(options: PlanOptions, machine: Machine, grid: Grid) -> Plan:
    """Search, with a progress bar at a terminal of rank 0."""
    console = Console(markup=False, stderr=True)
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
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def _row(one: Forecast, measured: Sequence[float]) -> dict[str, Any]:
    """Return a configuration and its forecast for JSON, in seconds, bytes and array elements."""
    parallel = one.config.parallel
    return {
        "grid": parallel.grid,
        **{key: getattr(parallel, key) for key in ("tensor", "zero", "recompute", "schedule", "virtual_stages")},
        "microbatches": one.config.training.microbatches,
        "seconds": one.seconds,
        **dict(zip(["measured"], measured, strict=False)),
        **asdict(report.time_shares(one)),
        "words": one.words,
        "messages": one.messages,
        "memory": one.peak,
        "bubble": one.bubble,
    }


def time_steps(configs: Sequence[Config], rounds: int) -> list[float]:
    """Return the median seconds of a step of each configuration on the ranks of this job, all taking turns.

    The weights and the optimizer states of all configurations are in memory together. Nothing is written.

    Notes
    -----
    **Communication:** the steps, and a gather of a number before and after each.
    """
    trainers = [Trainer(config, Grid(None, config.parallel.device, **config.parallel.grid)) for config in configs]
    times: list[list[float]] = [[] for _ in configs]
    for step in range(_WARM_UP + rounds):
        for trainer, seconds in zip(trainers, times, strict=True):
            seconds.append(_seconds_of_step(trainer, step))
    return [median(seconds[_WARM_UP:]) for seconds in times]


def _seconds_of_step(trainer: Trainer, step: int) -> float:
    """Return the seconds of a step on the slowest rank."""
    comm.collect(None, trainer.grid)
    begun = time.perf_counter()
    trainer.step(step)
    slowest: float = max(comm.collect(time.perf_counter() - begun, trainer.grid))
    return slowest


def dry_run(config: Config) -> None:
    """Print on rank 0 the cost of a training step on each stage, without starting the run.

    Parameters
    ----------
    config : Config
        The run. Without a grid, all ranks of the job go to the axis ``data``.

    Notes
    -----
    **Communication:** the messages of `colossal_mpi.machine.measure`.
    """
    if not config.parallel.grid:
        config = with_settings(config, {"data": world_size()}, config.parallel.tensor)
    machine, origin = machine_of(config, math.prod(config.parallel.grid.values()), GivenRates())
    if world_rank() == 0:
        report.show_forecast(forecast(config, machine))
        report.console().print(f"on ranks of {about(machine)} ({origin})")


def forecast_of_run(trainer: Trainer, flops: float) -> dict[str, Any] | None:
    """Return the forecast of a step of a run, for the comparison with the run's measurements.

    Parameters
    ----------
    trainer : Trainer
        The run, on its grid. All of its ranks call.
    flops : float
        Flop/s of all ranks together in products.

    Returns
    -------
    dict or None
        On rank 0, ``words`` that it receives in a step (array elements), ``memory`` of its arrays at the peak (bytes)
        and ``seconds`` of a step; None on the other ranks.

    Notes
    -----
    **Communication:** the messages of `colossal_mpi.machine.measure`.
    """
    grid = trainer.grid
    machine = calibrate(measure(grid, trainer.config.parallel.dtype, flops), grid)
    if grid.rank:
        return None
    one = forecast(with_settings(trainer.config, dict(grid.axes), trainer.config.parallel.tensor), machine)
    return {"words": one.stages[0].words, "memory": one.stages[0].peak, "seconds": one.seconds}
