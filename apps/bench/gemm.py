"""``colossal-mpi bench gemm``: start the ranks, let the competitors take turns, and report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import threadpoolctl
import typer
from mpi4py import MPI

from colossal_mpi.apps import launch
from colossal_mpi.apps.bench import options as checks
from colossal_mpi.apps.bench import report, scalapack
from colossal_mpi.apps.bench.competitors import Competitor, OneProcess
from colossal_mpi.apps.bench.distributed import Distributed, best_sizes
from colossal_mpi.apps.bench.entry import Entry, blank, fits
from colossal_mpi.apps.bench.noise import Meter
from colossal_mpi.apps.bench.options import DTYPES, NAMES, Options, Problem
from colossal_mpi.apps.command import Command, JsonFile
from colossal_mpi.grid import world_size

_FEWEST, _USUAL, _MOST = 3, 10, 100  # rounds
_SHORT, _LONG = 1.0, 20.0  # seconds


def main(options: Options) -> int:
    """Run a benchmark, on ranks that are started for it unless this is a job already; return an exit code.

    0 means that at least one competitor has a time: what is wrong or does not fit the memory is a row of the result.
    """
    if MPI.COMM_WORLD.size == options.ranks:
        return _run(options)
    command = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "gemm", *options.arguments()]
    with scalapack.environment() as settings:
        return launch.run(options.ranks, command, settings=settings)


def _run(options: Options) -> int:
    first, rows = MPI.COMM_WORLD.rank == 0, list[dict[str, Any]]()
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for problem in options.problems:
            found, notes = _compete(problem, options)
            rows += found
            if first:
                report.show(problem, options.ranks, found, notes)
                report.write(rows, options.json)
    if first and options.plot:
        report.plot(rows, options.plot)
    return 0 if any(row["error"] is None for row in rows) else 1


def _compete(problem: Problem, options: Options) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each competitor in a product, and what is to be said about them."""
    entries, missing = _entries(problem, options)
    held = [entry for entry in entries if entry.enters()]
    keep = fits(held)  # if not, operands are made anew for each turn
    for entry in held:
        entry.qualify(keep)
    meter = Meter()
    while not _enough(running := [entry for entry in held if entry.error is None], options.repeat):
        for entry in running:
            entry.turn(keep)
    foreign = meter.foreign()
    for entry in held:
        entry.competitor.forget()
    rows = report.best_of(entry.row(options.ranks) | {"foreign": foreign} for entry in entries)
    if missing and options.required:
        rows.append(blank("scalapack", problem, options.ranks, missing[0]))
    sources = missing or [entry.competitor.source for entry in entries if entry.competitor.source][:1]
    return rows, [f"scalapack: {source}" for source in sources]


def _entries(problem: Problem, options: Options) -> tuple[list[Entry], list[str]]:
    """Return the competitors, and the reason why ScaLAPACK is not among them."""
    found, missing = list[Competitor](), list[str]()
    for name in options.names:
        if name == "numpy":
            found.append(OneProcess(problem))
        elif name != "scalapack":
            found.append(Distributed(name, problem, options.ranks))
        elif isinstance(peer := scalapack.library(), str):
            missing.append(peer)
        else:
            grid = best_sizes("summa", problem, options.ranks)
            found += [scalapack.Scalapack(problem, peer, grid, block) for block in scalapack.BLOCKS]
    return [Entry(competitor) for competitor in found], missing


def _enough(entries: Sequence[Entry], repeat: int | None) -> bool:
    """Say whether the competitors have had their rounds.

    Unless the user says how many, these are 10, more until each has run for 1 s, and fewer, at least 3, once each has
    run for 20 s; never more than 100.
    """
    if not entries:
        return True
    rounds, ran = len(entries[0].seconds), min(sum(entry.seconds) for entry in entries)
    if repeat is not None:
        return rounds >= repeat
    return rounds >= _MOST or (rounds >= _USUAL and ran >= _SHORT) or (rounds >= _FEWEST and ran >= _LONG)


@dataclass(frozen=True, kw_only=True)
class Gemm(Command):
    """Time every matrix product beside NumPy and ScaLAPACK.

    All of them take turns in one run.
    """

    example = "colossal-mpi bench gemm --size 2048 --size 8192,512,512 --plot gemm.png"

    size: Annotated[list[str], typer.Option(help="M,N,K, or one number for a cube; may be repeated.")] = field(
        default_factory=lambda: ["2048"]
    )
    ranks: Annotated[int | None, typer.Option(help="Ranks to start: 4 by default, unless under mpiexec.")] = None
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float64"
    algorithm: Annotated[
        list[str],
        typer.Option(help=f"{', '.join(NAMES)}; may be repeated. By default all.", show_default=False),
    ] = field(default_factory=list)
    repeat: Annotated[int | None, typer.Option(help="Rounds of all of them. By default 10, and 1 s of each.")] = None
    json: JsonFile = None
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds to this file (PNG, PDF, SVG).")] = None

    def run(self) -> int:
        return main(
            checks.checked(
                self.size, self.ranks, self.dtype, self.algorithm, self.repeat, self.json, self.plot, world=world_size()
            )
        )
