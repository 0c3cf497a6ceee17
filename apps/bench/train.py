"""``colossal-mpi bench train``: the tokens per second of a training step, all competitors taking turns."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import threadpoolctl
import typer
from mpi4py import MPI
from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps import config as configs
from colossal_mpi.apps import launch
from colossal_mpi.apps.bench import timing
from colossal_mpi.apps.bench.noise import Meter
from colossal_mpi.apps.bench.report import warn_of_noise
from colossal_mpi.apps.bench.steps import Ours, PyTorch, Sizes, Step, peers
from colossal_mpi.apps.command import Command, GridAxes, JsonFile
from colossal_mpi.apps.files import check_writable
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import MODES

_WARM = 3  # steps, whose losses are compared
TOLERANCE = 1e-4
"""Greatest relative difference of a loss to PyTorch's, in float32, after the first steps."""


@dataclass(frozen=True)
class Options:
    """A checked command line."""

    sizes: Sizes
    axes: dict[str, int]
    tensor: str
    names: tuple[str, ...]
    repeat: int
    json: Path | None

    def arguments(self) -> Iterator[str]:
        """Yield the command line of the ranks."""
        for key, value in vars(self.sizes).items():
            yield from (f"--{key}", str(value))
        yield from ("--grid", ",".join(f"{axis}={size}" for axis, size in self.axes.items()))
        yield from ("--tensor", self.tensor, "--repeat", str(self.repeat))
        for name in self.names:
            yield from ("--kernels", name)
        if self.json is not None:
            yield from ("--json", str(self.json))


def checked(
    sizes: Sizes, grid: str | None, tensor: str, names: Sequence[str], repeat: int, json: Path | None
) -> Options:
    """Return the options of a command line.

    Raises
    ------
    ConfigError
        If one of them cannot be.
    """
    for key, value in vars(sizes).items():
        if value < 1:
            raise ConfigError(f"--{key} {value}: at least 1, for example --{key} {getattr(Sizes(), key)}")
    if sizes.hidden % sizes.heads:
        fitting = [str(n) for n in range(1, min(sizes.hidden, 4 * sizes.heads) + 1) if sizes.hidden % n == 0]
        raise ConfigError(f"--heads {sizes.heads} do not divide --hidden {sizes.hidden}: use {', '.join(fitting)}")
    if unknown := [name for name in names if name not in peers()]:
        raise ConfigError(f"--kernels {', '.join(unknown)}: use one of {', '.join(peers())}")
    if repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least one round has to run, for example --repeat 15")
    check_writable(json)
    axes = configs.parse_grid(grid) if grid else {"data": MPI.COMM_WORLD.size}
    return Options(sizes, axes, tensor, tuple(dict.fromkeys(names)) or peers(), repeat, json)


def main(options: Options) -> int:
    """Run the benchmark, on ranks that are started for it unless this is a job already; return an exit code."""
    ranks = math.prod(options.axes.values())
    if MPI.COMM_WORLD.size != ranks:
        command = [sys.executable, "-m", "colossal_mpi.apps.cli", "bench", "train", *options.arguments()]
        return launch.run(ranks, command)
    os.environ["OMP_NUM_THREADS"] = "1"  # for PyTorch, which is loaded from now on; its own step takes what it needs
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        rows = _compete(options)
    if MPI.COMM_WORLD.rank == 0:
        _show(options, rows)
        if options.json is not None:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["error"] is None for row in rows) else 1


@dataclass
class _Entry:
    step: Step
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Do a step and keep its time and, on rank 0, its loss."""

        def work() -> None:
            self.losses.append(self.step.do())

        with self.step.alone():
            self.seconds.append(timing.timed(work, self.step.group))


def _compete(options: Options) -> list[dict[str, Any]]:
    grid = Grid(None, "cpu", **options.axes)
    ours = [Ours(name, options.sizes, grid, options.tensor) for name in options.names if name != "pytorch"]
    entries = [_Entry(step) for step in ours]
    if "pytorch" in options.names:
        start = ours[0] if ours else Ours("reference", options.sizes, grid, options.tensor)
        entries.insert(0, _Entry(PyTorch(options.sizes, start.weights())))
    for entry in entries:
        for _ in range(_WARM):
            entry.turn()
        entry.seconds.clear()
    meter = Meter()
    for _ in range(options.repeat):
        for entry in entries:
            entry.turn()
    foreign = meter.foreign()
    return _rows(options, entries, foreign)


def _rows(options: Options, entries: Sequence[_Entry], foreign: float | None) -> list[dict[str, Any]]:
    base = entries[0] if entries[0].step.name == "pytorch" else None
    rows = []
    for entry in entries:
        best, median = min(entry.seconds), statistics.median(entry.seconds)
        off = _difference(entry, base) if base else None
        wrong = off is not None and not off <= TOLERANCE
        rows.append(
            {
                "name": entry.step.name,
                **vars(options.sizes),
                "grid": options.axes if entry is not base else {},
                "tensor": options.tensor if entry is not base else "none",
                "threads": entry.step.threads,
                "seconds": best,
                "median_seconds": median,
                "tokens_per_second": options.sizes.tokens / best,
                "median_tokens_per_second": options.sizes.tokens / median,
                "ratio": min(base.seconds) / best if base else None,
                "median_ratio": statistics.median(base.seconds) / median if base else None,
                "loss_difference": off,
                "repeats": len(entry.seconds),
                "foreign": foreign,
                "error": f"wrong: its losses differ from PyTorch's by {off:.1e}" if wrong else None,
            }
        )
    return rows


def _difference(entry: _Entry, base: _Entry) -> float:
    """Return the greatest relative difference of the first losses, known to rank 0."""
    pairs = zip(entry.losses[:_WARM], base.losses[:_WARM], strict=False)
    return MPI.COMM_WORLD.bcast(max((abs(mine - exact) / exact for mine, exact in pairs), default=0.0))


def _show(options: Options, rows: Sequence[dict[str, Any]]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, 100)
    console.print(f"\nGPT of {options.sizes}, float32, {options.repeat} interleaved repeats", markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("name", "where", "best s", "median s", "tokens/s", "median", "ratio", "median"):
        table.add_column(column, justify="left" if column in ("name", "where") else "right", no_wrap=True)
    for row in rows:
        grid = ",".join(f"{axis}={size}" for axis, size in row["grid"].items() if size > 1)
        where = f"{row['tensor']} {grid}" if grid else f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
        ratios = [f"{row[key]:.3f}" if row[key] else "-" for key in ("ratio", "median_ratio")]
        speeds = [f"{row[key]:,.0f}" for key in ("tokens_per_second", "median_tokens_per_second")]
        table.add_row(row["name"], where, f"{row['seconds']:.4f}", f"{row['median_seconds']:.4f}", *speeds, *ratios)
    console.print(table)
    console.print("a step: forward, backward, clipping and AdamW; ratio: to PyTorch's speed")
    for row in (row for row in rows if row["error"]):
        console.print(f"{row['name']}: {row['error']}", markup=False)
    warn_of_noise(console, rows)


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Time the training step of a GPT beside PyTorch eager.

    All of them take turns.
    """

    example = "colossal-mpi bench train --hidden 512 --grid row=2,col=2 --tensor 2d"

    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 4
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 256
    kernels: Annotated[
        list[str],
        typer.Option(help="pytorch, reference, torch; may be repeated; by default all of them.", show_default=False),
    ] = field(default_factory=list)
    grid: GridAxes = None
    tensor: Annotated[str, typer.Option(help=f"Tensor mode: {', '.join(MODES)}.")] = "none"
    repeat: Annotated[int, typer.Option(help="Rounds of all of them.")] = 15
    json: JsonFile = None

    def run(self) -> int:
        sizes = Sizes(self.layers, self.hidden, self.heads, self.sequence, self.batch, self.vocabulary)
        return main(checked(sizes, self.grid, self.tensor, self.kernels, self.repeat, self.json))
