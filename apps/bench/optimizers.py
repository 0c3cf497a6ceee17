"""``colossal-mpi bench optimizers``: validation losses of one model by each optimizer, at several learning rates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi import comm
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.bench.curves import plot
from colossal_mpi.apps.command import Command, Settings
from colossal_mpi.apps.files import check_writable
from colossal_mpi.apps.training.train import make_grid
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import world_size
from colossal_mpi.layers.optim import OPTIMIZERS

RATES = (1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2)
"""A decade, in equal ratios but for rounding."""


@dataclass(frozen=True)
class Case:
    """One training run; equal cases have equal losses, to rounding, on any grid."""

    config: str
    settings: tuple[str, ...]
    steps: int
    every: int
    """Steps between validations."""
    seed: int
    optimizer: str
    lr: float

    def load(self) -> configs.Config:
        """Return the configuration of the run: all ranks along ``data``, unless the settings name another grid."""
        own = {"steps": self.steps, "seed": self.seed, "optimizer": self.optimizer, "lr": self.lr}
        plain = [configs.grid_setting({"data": world_size()}), "parallel.tensor=none"]
        return configs.load(self.config, [*plain, *[f"training.{key}={x}" for key, x in own.items()], *self.settings])


def parse(text: str) -> tuple[str, tuple[float, ...]]:
    """Return optimizer and rates of ``muon=1e-3,2e-3``, or of ``muon``, which is tried at `RATES`.

    Raises
    ------
    ConfigError
        If there is no such optimizer, or a rate is no positive number.
    """
    name, equals, numbers = text.partition("=")
    try:
        rates = tuple(float(number) for number in numbers.split(",")) if equals else RATES
    except ValueError:
        rates = ()
    if name not in OPTIMIZERS or not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(
            f"--optimizer {text!r}: write one of {', '.join(OPTIMIZERS)}, alone or with rates, as muon=1e-3,2e-3"
        )
    return name, rates


def cases(
    config: str,
    settings: Sequence[str] | None,
    steps: int,
    every: int,
    seeds: Sequence[int] | None,
    optimizers: Sequence[str] | None,
) -> list[Case]:
    """Return every case of the command line; without optimizers they are AdamW and Muon.

    Raises
    ------
    ConfigError
        If a number of steps is below 1, or an optimizer is at fault.
    """
    if min(steps, every) < 1:
        raise ConfigError(f"--steps {steps} --every {every}: at least 1 of each")
    named = [parse(text) for text in optimizers or ("adamw", "muon")]
    each = [(seed, name, lr) for name, rates in named for lr in rates for seed in dict.fromkeys(seeds or (0,))]
    return [Case(config, tuple(settings or ()), steps, every, *rest) for rest in dict.fromkeys(each)]


def main(cases: Sequence[Case], file: Path | None = None, picture: Path | None = None) -> int:
    """Train each case, show the losses, write and draw them; return an exit code.

    Cases that `file` holds already are taken from it: a benchmark that was stopped goes on, and grows.

    Raises
    ------
    ConfigError
        On all ranks, if the configuration is at fault, or a file cannot be written or is no such list.
    """
    loaded = [case.load() for case in cases]  # all of them, before the first is trained
    grid = make_grid(loaded[0])
    with comm.agreed(grid):
        found = _read(file, picture) if grid.rank == 0 else []
    rows = comm.share(found, grid)
    for case, config in zip(cases, loaded, strict=True):
        if _row_of(case, rows) is None:
            rows.append(_trained(case, Trainer(config, grid)))
            if grid.rank == 0:
                _tell(rows, file)
    if grid.rank == 0:
        chosen = [row for case in cases if (row := _row_of(case, rows))]
        _show(chosen)
        if picture is not None:
            plot(chosen, picture)
    return 0


def _read(file: Path | None, picture: Path | None) -> list[dict[str, Any]]:
    for path in (file, picture):
        check_writable(path)
    if file is None or not (text := file.read_text(encoding="utf-8")):
        return []
    try:
        rows = json.loads(text)
        _ = [row["case"]["optimizer"] for row in rows]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file} is no list of losses of this benchmark: give another file") from None
    return rows


def _plain(case: Case) -> dict[str, Any]:
    return {**asdict(case), "settings": list(case.settings)}


def _row_of(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((row for row in rows if row["case"] == _plain(case)), None)


def _trained(case: Case, trainer: Trainer) -> dict[str, Any]:
    """Return the row of a case; its last loss is None where training ended in what is no number."""
    held = list(_validations(case, trainer))
    at, losses = [step for step, _ in held], [loss for _, loss in held]
    final = losses[-1] if at and at[-1] == case.steps and math.isfinite(losses[-1]) else None
    return {"case": _plain(case), "steps": at, "val_loss": losses, "final": final}


def _validations(case: Case, trainer: Trainer) -> Iterator[tuple[int, float]]:
    for step in range(case.steps):
        loss = trainer.step(step)["loss"]
        if loss is None or not math.isfinite(loss):
            return
        if (step + 1) % case.every == 0 or step + 1 == case.steps:
            yield step + 1, trainer.validate()["val_loss"]


def _tell(rows: Sequence[dict[str, Any]], file: Path | None) -> None:
    case, final = rows[-1]["case"], rows[-1]["final"]
    print(f"{case['optimizer']} lr {case['lr']:g} seed {case['seed']}: {_figure(final)}", flush=True)
    if file is not None:
        whole = file.with_suffix(".partial")
        whole.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        whole.replace(file)


def _figure(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the final losses, optimizers by rates, one column for each seed."""
    seeds = sorted({row["case"]["seed"] for row in rows})
    table = Table("optimizer", "lr", *[f"seed {seed}" for seed in seeds], box=box.SIMPLE_HEAD)
    lines: dict[tuple[str, float], dict[int, str]] = {}
    for row in rows:
        case = row["case"]
        lines.setdefault((case["optimizer"], case["lr"]), {})[case["seed"]] = _figure(row["final"])
    for (name, lr), figures in lines.items():
        table.add_row(name, f"{lr:g}", *[figures.get(seed, "-") for seed in seeds])
    console = Console(highlight=False)
    console.print(table)
    console.print(f"validation loss after {rows[0]['case']['steps']} steps", markup=False)


@dataclass(frozen=True, kw_only=True)
class Optimizers(Command):
    """Train one model with several optimizers, and compare validation losses.

    Each optimizer is tried at several learning rates; the losses are compared at equal steps.
    """

    example = "colossal-mpi bench optimizers --optimizer adamw --optimizer muon=2e-3"

    optimizer: Annotated[list[str], typer.Option(help="NAME, or NAME=RATE,RATE; may be repeated.")] = field(
        default_factory=lambda: ["adamw", "muon"]
    )
    config: Annotated[str, typer.Option(help="A TOML file, or one that comes with the package.")] = "demo"
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 400
    every: Annotated[int, typer.Option(help="Steps between validations.")] = 25
    seed: Annotated[list[int], typer.Option(help="Seeds; may be repeated.")] = field(default_factory=lambda: [0])
    setting: Settings = field(default_factory=list)
    json: Annotated[
        Path | None, typer.Option(help="Keep the losses in this file; losses that it has are not computed again.")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Draw them to this file (PNG, PDF, SVG).")] = None

    def run(self) -> int:
        chosen = cases(self.config, self.setting, self.steps, self.every, self.seed, self.optimizer)
        return main(chosen, self.json, self.plot)
