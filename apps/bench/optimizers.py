"""``colossal-mpi bench optimizers``: validation losses of one model with each optimizer at several learning rates.

`Optimizers` trains one `Case` after the other and keeps the losses in a file, so that a stopped benchmark continues
where it was.
"""

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
from colossal_mpi.apps.bench import harness
from colossal_mpi.apps.bench.harness import Row
from colossal_mpi.apps.command import Command, Settings
from colossal_mpi.apps.training import Trainer, make_grid
from colossal_mpi.errors import ConfigError, NonFiniteError
from colossal_mpi.grid import world_size
from colossal_mpi.layers.optim import OPTIMIZERS

RATES = (1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2)
"""The learning rates to try: a decade in equal ratios, rounded."""
_COLORS = ("#5b6770", "#c0392b", "#4a7fb5", "#2e8b57", "#8e5ea2", "#d08c2f")


@dataclass(frozen=True)
class Case:
    """One training run; equal cases have equal losses, up to rounding, on any grid."""

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


@dataclass(frozen=True, kw_only=True)
class Optimizers(Command):
    """Train one model with several optimizers, and compare validation losses.

    Each optimizer is tried at several learning rates; the losses are compared at equal steps.
    """

    example = "colossal-mpi bench optimizers --optimizer adamw --optimizer muon=2e-3"

    optimizer: Annotated[
        list[str], typer.Option(help=f"NAME, or NAME=RATE,RATE; may be repeated. {', '.join(OPTIMIZERS)}.")
    ] = field(default_factory=lambda: ["adamw", "muon"])
    config: Annotated[str, typer.Option(help="A TOML file, or one that comes with the package.")] = "demo"
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 400
    every: Annotated[int, typer.Option(help="Steps between validations.")] = 25
    seed: Annotated[list[int], typer.Option(help="Seeds; may be repeated.")] = field(default_factory=lambda: [0])
    setting: Settings = field(default_factory=list)
    json: Annotated[
        Path | None, typer.Option(help="Keep the losses in this file; losses that it has are not computed again.")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Draw the losses to this file (PNG, PDF, SVG).")] = None

    def __post_init__(self) -> None:
        if min(self.steps, self.every) < 1:
            raise ConfigError(f"--steps {self.steps} --every {self.every}: at least 1 of each")
        configs.load(self.config, self.setting)  # its plugins may register optimizers
        assert self.cases  # parses --optimizer

    @property
    def cases(self) -> list[Case]:
        """Every training run."""
        named = [parse(text) for text in self.optimizer]
        found = [(seed, name, lr) for name, rates in named for lr in rates for seed in dict.fromkeys(self.seed)]
        settings = tuple(self.setting)
        return [Case(self.config, settings, self.steps, self.every, *one) for one in dict.fromkeys(found)]

    def run(self) -> int:
        """Train each case that the JSON file lacks, then show, write and draw the losses.

        Raises
        ------
        ConfigError
            On all ranks, if the configuration is wrong, a file cannot be written, or the JSON file is no such list.
        """
        loaded = [case.load() for case in self.cases]  # all of them, before the first one is trained
        grid = make_grid(loaded[0])
        with comm.agreed(grid):
            found = self._read() if grid.rank == 0 else []
        rows = comm.share(found, grid)
        for case, config in zip(self.cases, loaded, strict=True):
            if _row_of(case, rows) is None:
                rows.append(_train(case, Trainer(config, grid)))
                if grid.rank == 0:
                    print(_line(rows[-1]), flush=True)
                    harness.write(rows, self.json)
        if grid.rank == 0:
            chosen = [row for case in self.cases if (row := _row_of(case, rows))]
            show(chosen)
            if self.plot is not None:
                draw(chosen, self.plot)
        return 0

    def _read(self) -> list[Row]:
        harness.check_common(self)
        if self.json is None or not (text := self.json.read_text(encoding="utf-8")):
            return []
        try:
            rows: list[Row] = json.loads(text)
            _ = [row["case"]["optimizer"] for row in rows]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{self.json} is no list of losses of this benchmark: give another file") from None
        return rows


def parse(text: str) -> tuple[str, tuple[float, ...]]:
    """Return optimizer and learning rates of ``muon=1e-3,2e-3``, or of ``muon``, which is tried at `RATES`.

    Parameters
    ----------
    text : str
        A value of ``--optimizer``.

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


def _key(case: Case) -> Row:
    return {**asdict(case), "settings": list(case.settings)}


def _row_of(case: Case, rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["case"] == _key(case)), None)


def _train(case: Case, trainer: Trainer) -> Row:
    """Return the row of a case; its last loss is None where the loss became infinite or NaN."""
    held = list(_validations(case, trainer))
    at, losses = [step for step, _ in held], [loss for _, loss in held]
    final = losses[-1] if at and at[-1] == case.steps and math.isfinite(losses[-1]) else None
    return {"case": _key(case), "steps": at, "val_loss": losses, "final": final}


def _validations(case: Case, trainer: Trainer) -> Iterator[tuple[int, float]]:
    for step in range(case.steps):
        try:
            trainer.step(step)
        except NonFiniteError:
            return
        if (step + 1) % case.every == 0 or step + 1 == case.steps:
            yield step + 1, trainer.validate()["val_loss"]


def _line(row: Row) -> str:
    case = row["case"]
    return f"{case['optimizer']} lr {case['lr']:g} seed {case['seed']}: {_figure(row['final'])}"


def _figure(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def show(rows: Sequence[Row]) -> None:
    """Print the final losses, a line for each optimizer and rate, a column for each seed."""
    seeds = sorted({row["case"]["seed"] for row in rows})
    table = Table("optimizer", "lr", *[f"seed {seed}" for seed in seeds], box=box.SIMPLE_HEAD)
    lines: dict[tuple[str, float], dict[int, str]] = {}
    for row in rows:
        case = row["case"]
        lines.setdefault((case["optimizer"], case["lr"]), {})[case["seed"]] = _figure(row["final"])
    for (name, lr), figures in lines.items():
        table.add_row(name, f"{lr:g}", *[figures.get(seed, "-") for seed in seeds])
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(f"validation loss after {rows[0]['case']['steps']} steps")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the validation losses over the steps, with the best rate of each optimizer thick, and the last ones by rate.

    Parameters
    ----------
    rows : sequence of dict
        Rows with ``case``, ``steps``, ``val_loss`` and ``final``.
    path : Path
        PNG, PDF or SVG file.
    """
    names = list(dict.fromkeys(row["case"]["optimizer"] for row in rows))
    with harness.figure(path, 1, 2, (11, 4.6)) as (_, panels):
        left, right = panels[0]
        for name, color in zip(names, _COLORS * len(names), strict=False):
            own = [row for row in rows if row["case"]["optimizer"] == name]
            _curves(left, own, color)
            _finals(right, own, color)
        steps = rows[0]["case"]["steps"]
        left.set(xlabel="step", ylabel="validation loss (nats)", title="over the steps; thick: the best rate")
        right.set(xlabel="learning rate", title=f"after {steps} steps", xscale="log")
        _ticks(right, [row["case"]["lr"] for row in rows])
        _zoom(left, rows)
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)


def _means(rows: Sequence[Row]) -> dict[float, float]:
    """Return the mean of the final loss over the seeds for each rate; infinity where a seed has none."""
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(row["case"]["lr"], []).append(math.inf if row["final"] is None else row["final"])
    return {lr: sum(losses) / len(losses) for lr, losses in found.items()}


def _curves(axes: Any, rows: Sequence[Row], color: str) -> None:
    means = _means(rows)
    best, labelled = min(means, key=lambda lr: means[lr]), False
    for row in rows:
        case = row["case"]
        if case["lr"] != best:
            axes.plot(row["steps"], row["val_loss"], color=color, lw=0.8, alpha=0.4, zorder=1)
            continue
        label = None if labelled else f"{case['optimizer']}, lr {best:g}: {means[best]:.3f}"
        axes.plot(row["steps"], row["val_loss"], color=color, lw=2.0, label=label, zorder=2)
        labelled = True


def _finals(axes: Any, rows: Sequence[Row], color: str) -> None:
    means = _means(rows)
    rates = sorted(lr for lr in means if math.isfinite(means[lr]))
    axes.plot(rates, [means[lr] for lr in rates], "o-", color=color, label=rows[0]["case"]["optimizer"])


def _ticks(axes: Any, rates: Sequence[float]) -> None:
    at = sorted(set(rates))
    axes.set_xticks(at, [f"{lr:g}" for lr in at], size=8, rotation=45)
    axes.minorticks_off()


def _zoom(axes: Any, rows: Sequence[Row]) -> None:
    """Cut off the losses of the first quarter of the steps, beside which the differences at the end are too small."""
    seen = [
        loss
        for row in rows
        for step, loss in zip(row["steps"], row["val_loss"], strict=True)
        if 4 * step >= row["case"]["steps"] and math.isfinite(loss)
    ]
    if seen:
        low, high = min(seen), sorted(seen)[int(0.98 * (len(seen) - 1))]
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
