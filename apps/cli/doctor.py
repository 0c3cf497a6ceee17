"""``colossal-mpi doctor``: examine the machine, the environment and the job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi.apps.command import Command
from colossal_mpi.apps.doctor import diagnose


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Examine MPI, launcher, cores, GPUs, disk and network, and say what to do.

    Start it as you start the program: under mpiexec or srun, with the same variables. The exit code is 1 if something
    is bad.
    """

    example = "mpiexec -n 4 colossal-mpi doctor --directory /scratch/me/runs"

    directory: Annotated[Path, typer.Option(help="The directory for runs.")] = Path("runs")
    seconds: Annotated[float, typer.Option(help="Time for measuring messages between ranks, in seconds.")] = 4.0
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False

    def run(self) -> int:
        return diagnose(self.directory, self.seconds, self.json)
