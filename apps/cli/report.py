"""``colossal-mpi report``: draw runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi.apps import report
from colossal_mpi.apps.command import Command
from colossal_mpi.grid import world_rank


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Draw one run, or several runs on the same axes, as PNG files and one HTML page.

    The page needs no other file and no network.
    """

    example = "colossal-mpi report runs/demo runs/other --output comparison"

    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="The directory of a run, or of several.")]
    output: Annotated[
        Path | None,
        typer.Option(help="Directory to write to; by default RUN/report, for several runs RUN/report/comparison."),
    ] = None

    def run(self) -> int:
        if world_rank() > 0:  # the ranks of a job must not write the same pictures
            return 0
        page, lacking = report.write(self.runs, self.output)
        for picture, reason in lacking:
            typer.echo(f"not shown: {picture}: {reason}")
        typer.echo(f"report {page}")
        return 0
