"""``colossal-mpi run``: start a program on several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from colossal_mpi.apps import launch
from colossal_mpi.apps.command import Command
from colossal_mpi.runtime import watchdog


@dataclass(frozen=True, kw_only=True)
class Run(Command):
    """Start COMMAND on several ranks with the mpiexec of the MPI library in use.

    It prints the plain line that does the same without this program.
    """

    example = "colossal-mpi run -n 4 colossal-mpi train demo"
    context_settings: ClassVar[dict[str, object]] = {"ignore_unknown_options": True, "allow_interspersed_args": False}

    command: Annotated[
        list[str], typer.Argument(help="A program and its arguments; this Python runs a file that ends in .py.")
    ]
    ranks: Annotated[int, typer.Option("-n", help="Number of ranks.")] = 1
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds for which a rank waits for the others at most; 0: for ever.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the line and do not run it.")] = False

    def run(self) -> int:
        settings = {} if self.timeout is None else {watchdog.VARIABLE: f"{self.timeout:g}"}
        return launch.run(self.ranks, self.command, self.dry_run, settings)
