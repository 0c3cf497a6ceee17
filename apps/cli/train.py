"""``colossal-mpi train``: train a model, resume a run, or show what a run would do."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated

import typer

from colossal_mpi import comm
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import planning
from colossal_mpi.apps.command import Command, GridAxes, Plugins, Settings
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training import resume, start, tasks
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import world_rank

_TENSOR, _KERNELS = (", ".join(configs.choices(key)) for key in ("parallel.tensor", "parallel.kernels"))


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train a model on text or images.

    Run it under mpiexec or srun, or alone on one rank.
    """

    example = "mpiexec -n 8 colossal-mpi train demo --grid data=2,row=2,col=2 --set training.steps=50"

    config: Annotated[
        str | None, typer.Argument(help=f"A TOML file, or one that comes with the package: {configs.shipped()}.")
    ] = None
    grid: GridAxes = None
    tensor: Annotated[str | None, typer.Option(help=f"Tensor mode: {_TENSOR}.")] = None
    kernels: Annotated[str | None, typer.Option(help=f"Local kernels: {_KERNELS}.")] = None
    setting: Settings = field(default_factory=list)
    plugin: Plugins = field(default_factory=list)
    resume: Annotated[
        str | None, typer.Option(help="Go on with the run in this directory, or from this checkpoint.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the run directory.")] = False
    trace: Annotated[int, typer.Option(help="Trace this many steps, from the second on, into trace.json.")] = 0
    check_replicas: Annotated[int | None, typer.Option(help="Compare replicas every so many steps.")] = None
    check: Annotated[bool, typer.Option("--check", help="Check that all ranks make the same calls.")] = False
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the configuration with the meaning of every key, and stop.")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print memory, words and time of a step on the grid, and stop.")
    ] = False

    def __post_init__(self) -> None:
        if (self.config is None) == (self.resume is None):
            raise ConfigError("train: give a configuration, or --resume and the directory of a run")
        if self.resume is not None and self.overwrite:
            raise ConfigError("train: --resume goes on with a run and --overwrite replaces it: give one of them")
        if self.trace < 0:
            raise ConfigError(f"train: --trace {self.trace}: give the number of steps, 0 or more")

    def run(self) -> int:
        if self.show_config or self.dry_run:
            return self._show()
        with comm.checked() if self.check else nullcontext():
            return self._train()

    def _train(self) -> int:
        """Train from the beginning, or go on with a run."""
        if self.config is not None:
            return start(configs.load(self.config, self.settings), self.overwrite, self.trace, planning.forecast_of_run)
        return resume(str(self.resume), self.settings, self.trace, planning.forecast_of_run)

    @property
    def settings(self) -> list[str]:
        """The settings of ``--set``, ``--plugin``, ``--tensor``, ``--kernels``, ``--check-replicas``, ``--grid``."""
        given = {"tensor": self.tensor, "kernels": self.kernels}
        found = [
            *self.setting,
            *(configs.setting(f"parallel.{key}", value) for key, value in given.items() if value is not None),
        ]
        if self.check_replicas is not None:
            found.append(f"training.check_replicas={self.check_replicas}")
        if self.plugin:
            found.append(configs.setting("run.plugins", self.plugin))
        return [*found, configs.grid_setting(configs.parse_grid(self.grid))] if self.grid is not None else found

    def _show(self) -> int:
        """Print the configuration of the run, or the cost of one of its steps."""
        source = self.config if self.config is not None else str(RunDirectory.of(str(self.resume))[0].config)
        config = tasks.complete(configs.load(source, self.settings))
        if self.dry_run:
            planning.dry_run(config)
        elif world_rank() == 0:
            sys.stdout.write(configs.commented(config))
        return 0
