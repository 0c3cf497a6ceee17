"""``colossal-mpi bench checkpoint``: saving and loading beside plain writing and reading of the same bytes."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from mpi4py import MPI
from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps import launch
from colossal_mpi.apps.bench.noise import Meter
from colossal_mpi.apps.bench.report import warn_of_noise
from colossal_mpi.apps.bench.saving import Saving, Turn
from colossal_mpi.apps.command import Command, JsonFile
from colossal_mpi.apps.files import check_writable
from colossal_mpi.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    size: float
    """GiB of the state, of all ranks together."""
    ranks: int
    directory: Path
    repeat: int
    json: Path | None

    def arguments(self) -> Iterator[str]:
        """Yield the command line of the ranks."""
        yield from ("--size", str(self.size), "--ranks", str(self.ranks))
        yield from ("--directory", str(self.directory), "--repeat", str(self.repeat))
        if self.json is not None:
            yield from ("--json", str(self.json))


def checked(size: float, ranks: int | None, directory: Path, repeat: int, json: Path | None) -> Options:
    """Return the options of a command line.

    Raises
    ------
    ConfigError
        If one of them cannot be.
    """
    if not 1e-4 <= size < 1e6:
        raise ConfigError(f"--size {size}: GiB of the state, for example --size 1")
    if repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least one round has to run, for example --repeat 5")
    world = MPI.COMM_WORLD.size
    if ranks is not None and (ranks < 1 or world not in (1, ranks)):
        raise ConfigError(f"--ranks {ranks} in a job of {world} ranks: at least 1, and left out under mpiexec")
    check_writable(json)
    if world == 1 and ranks is None:
        ranks = 4
    return Options(size, ranks or world, directory, repeat, json)


def main(options: Options) -> int:
    """Run the benchmark, on ranks that are started for it unless this is a job already; return an exit code."""
    if MPI.COMM_WORLD.size != options.ranks:
        command = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "checkpoint", *options.arguments()]
        return launch.run(options.ranks, command)
    directory = options.directory / "checkpoint-bench"
    try:
        rows, size = _compete(options, directory)
    finally:
        if MPI.COMM_WORLD.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
    if MPI.COMM_WORLD.rank == 0:
        _show(options, size, rows)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _compete(options: Options, directory: Path) -> tuple[list[dict[str, Any]], int]:
    saving = Saving(options.size, directory)
    turns, meter, behind = saving.turns(), Meter(), []
    for _ in range(options.repeat):
        for turn in turns:
            turn.take()
        behind.append(saving.behind())
    foreign = meter.foreign()
    rows = [_row(turn, turns, saving.bytes) for turn in turns]
    return [row | {"foreign": foreign} for row in [*rows, _behind(behind, saving.bytes)]], saving.bytes


def _row(turn: Turn, turns: Sequence[Turn], size: int) -> dict[str, Any]:
    base = next((other for other in turns if other.name == turn.against), None)
    best, median = min(turn.seconds), statistics.median(turn.seconds)
    return {
        "name": turn.name,
        "bytes": size,
        "seconds": best,
        "median_seconds": median,
        "rate": size / best,
        "median_rate": size / median,
        "ratio": min(base.seconds) / best if base else None,
        "median_ratio": statistics.median(base.seconds) / median if base else None,
        "extra_memory": max(turn.extra) / size,
        "from_disk": statistics.median(turn.fetched) / size,
    }


def _behind(found: Sequence[dict[str, float]], size: int) -> dict[str, Any]:
    """Return the row of saving in the background; its first time, which takes the memory, is told apart too."""
    best, median = min(one["save"] for one in found), statistics.median(one["save"] for one in found)
    return {
        "name": "save in the background",
        "bytes": size,
        "seconds": best,
        "median_seconds": median,
        "rate": size / best,
        "median_rate": size / median,
        "stall": min(one["stall"] for one in found),
        "median_stall": statistics.median(one["stall"] for one in found),
        "first_stall": found[0]["stall"],
        "step_alone": statistics.median(one["alone"] for one in found),
        "step_beside": statistics.median(one["beside"] for one in found),
    }


def _show(options: Options, size: int, rows: Sequence[dict[str, Any]]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, 100)
    console.print(
        f"\nstate of {size / 2**30:.2f} GiB over {options.ranks} ranks in {options.directory}, "
        f"{options.repeat} interleaved repeats",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("name", "best s", "median s", "GiB/s", "median", "ratio", "median", "from disk", "extra memory"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    for row in rows[:-1]:
        table.add_row(
            row["name"],
            *(f"{row[key]:.3f}" for key in ("seconds", "median_seconds")),
            *(f"{row[key] / 2**30:.2f}" for key in ("rate", "median_rate")),
            *(f"{row[key]:.2f}" if row[key] else "" for key in ("ratio", "median_ratio")),
            f"{row['from_disk']:.0%}",
            f"{row['extra_memory']:.1%}",
        )
    console.print(table)
    console.print("ratio: to the speed of the plain one; all that is written is on the disk (fsync) in its time")
    last, save = rows[-1], rows[1]
    own, other = (last["median_stall"] / row["median_seconds"] for row in (last, save))
    console.print(
        f"in the background: whole after {last['median_seconds']:.2f} s, for which training waited "
        f"{last['median_stall'] * 1e3:.0f} ms, {own:.1%} of it and {other:.1%} of the time of a save (best "
        f"{last['stall'] * 1e3:.0f} ms, the first time {last['first_stall'] * 1e3:.0f} ms); a step beside it took "
        f"{last['step_beside']:.2f} s, alone {last['step_alone']:.2f} s",
        markup=False,
    )
    warn_of_noise(console, rows)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Command):
    """Time saving and loading beside plain writing and reading of files.

    It also measures how long training waits while a checkpoint is written in the background.
    """

    example = "colossal-mpi bench checkpoint --size 2 --directory /scratch/me"

    size: Annotated[float, typer.Option(help="GiB of the state, of all ranks together.")] = 1.0
    ranks: Annotated[int | None, typer.Option(help="Ranks to start: 4 by default, unless under mpiexec.")] = None
    directory: Annotated[Path, typer.Option(help="Directory to write to, on the disk to measure.")] = Path("runs")
    repeat: Annotated[int, typer.Option(help="Rounds of all of them.")] = 5
    json: JsonFile = None

    def run(self) -> int:
        return main(checked(self.size, self.ranks, self.directory, self.repeat, self.json))
