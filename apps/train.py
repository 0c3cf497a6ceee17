"""``colossal-mpi train``: the loop, its progress and its files."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from colossal_mpi import comm, ledger
from colossal_mpi.apps.config import Config, load
from colossal_mpi.apps.plot import plot_run, shares
from colossal_mpi.apps.rundir import RunDirectory
from colossal_mpi.apps.trainer import Trainer
from colossal_mpi.errors import ColossalError, ConfigError
from colossal_mpi.grid import Grid, world_size


def make_grid(config: Config) -> Grid:
    """Return the grid of a run; without axes in the configuration all ranks go to ``data``."""
    parallel = config.parallel
    axes = parallel.grid or {"data": world_size()}
    return Grid(None, parallel.device, **axes)


def start(config: Config, overwrite: bool = False) -> None:
    """Train from the beginning, into a new run directory."""
    grid = make_grid(config)
    trainer, directory = Trainer(config, grid), RunDirectory(config.run.directory)
    with comm.agreed(grid):
        if grid.rank == 0:
            directory.create(config, overwrite)
    _train(trainer, directory, 0)


def resume(path: str, settings: list[str]) -> None:
    """Go on with the run at `path` from its latest checkpoint, bitwise as if it had not stopped on the same grid."""
    directory = RunDirectory(path)
    latest = directory.latest()
    config = load(str(directory.config), settings)
    grid = make_grid(config)
    trainer = Trainer(config, grid)
    done = trainer.restore(latest)
    if done > config.training.steps:
        raise ConfigError(f"{latest} has done {done} steps, and training.steps={config.training.steps}: give more")
    with comm.agreed(grid):
        if grid.rank == 0:
            directory.rewind(done)
            directory.write_config(config)
    _train(trainer, directory, done)


def _train(trainer: Trainer, directory: RunDirectory, done: int) -> None:
    training, first = trainer.config.training, trainer.grid.rank == 0
    report = _Report(trainer, directory, done) if first else None
    try:
        _steps(trainer, directory, done, report)
        text = trainer.task.sample(training.sample) if training.sample else b""
        if report:
            report.finish(text)
    finally:
        if report:
            report.close()


def _steps(trainer: Trainer, directory: RunDirectory, done: int, report: _Report | None) -> None:
    training = trainer.config.training
    for step in range(done, training.steps):
        row = _timed_step(trainer, step)
        if not math.isfinite(row["loss"] + row["gradient_norm"]):
            trainer.saving.finish()
            raise ColossalError(
                f"step {step + 1}: loss {row['loss']}, gradient norm {row['gradient_norm']}; lower training.lr and go "
                f"on from the last checkpoint with --resume {directory.path}"
            )
        last = step + 1 == training.steps
        if last or (step + 1) % training.evaluate_every == 0:
            row |= trainer.validate()
        if report:
            report.step(row)
        if last or (step + 1) % training.checkpoint_every == 0:
            _checkpoint(trainer, directory, step + 1, training.background_checkpoints and not last)
        else:
            trainer.saving.poll()


def _checkpoint(trainer: Trainer, directory: RunDirectory, step: int, background: bool) -> None:
    training = trainer.config.training
    after = partial(directory.made, step, training.keep_last, training.keep_every)
    trainer.save(directory.checkpoint(step), step, after, background)


def _timed_step(trainer: Trainer, step: int) -> dict[str, Any]:
    begun = time.perf_counter()
    with ledger.record() as moved:
        row: dict[str, Any] = {"step": step + 1, **trainer.step(step)}
    row["seconds"] = time.perf_counter() - begun
    task = trainer.task
    speed = trainer.config.training.batch * task.per_sample / row["seconds"]
    return row | {f"{task.unit}_per_second": speed, "words_received": moved.words}


class _Report:
    """What rank 0 shows and writes: a bar at a terminal, a line every few steps otherwise."""

    def __init__(self, trainer: Trainer, directory: RunDirectory, done: int) -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # the sample may hold what an ASCII terminal cannot show
        self.training, self.directory, self.done = trainer.config.training, directory, done
        self.unit, self.per = trainer.task.unit, trainer.task.per
        self.console, self.begun = Console(soft_wrap=True), time.perf_counter()
        self.bar: Any
        self.task: Any
        self.bar, self.task = _bar(self.console, self.training.steps, done) if sys.stdout.isatty() else (None, None)
        parallel, task = trainer.config.parallel, trainer.task
        self._say(
            f"{task.name} of {trainer.parameters:,} parameters, {parallel.dtype}, tensor {parallel.tensor} on "
            f"{trainer.grid}, {trainer.kernels} kernels; {task.about}"
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def step(self, row: dict[str, Any]) -> None:
        """Write a step's metrics and show them."""
        self.directory.append(row)
        made = row["step"] - self.done
        left = (time.perf_counter() - self.begun) / made * (self.training.steps - row["step"])
        text = f"loss {row['loss']:.3f}  {row[f'{self.unit}_per_second']:,.0f} {self.unit}/s"
        if self.bar:
            self.bar.update(self.task, completed=row["step"], text=text)
        if "val_loss" in row:
            self._say(f"step {row['step']:5d}/{self.training.steps}  {text}  {_validation(row)}")
        elif not self.bar and (row["step"] % self.training.log_every == 0 or made == 1):
            self._say(f"step {row['step']:5d}/{self.training.steps}  {text}  {_clock(left)} left")

    def finish(self, text: bytes) -> None:
        """Write the plot and the sample, and say where everything is."""
        self.close()
        plot_run(self.directory.rows(), self.per, self.directory.plot)
        self.directory.sample.write_bytes(text)
        if text:
            self._say("sample: " + text.decode(errors="replace").strip("\n"))
        checkpoint = self.directory.checkpoints / self.directory.latest().name
        self._say(f"plot {self.directory.plot}, metrics {self.directory.metrics}, checkpoint {checkpoint}")

    def close(self) -> None:
        """Give the terminal back: while the bar is live, what goes to stderr is written to stdout."""
        if self.bar:
            self.bar.stop()


def _bar(console: Console, total: int, done: int) -> tuple[Any, Any]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    bar.start()
    return bar, bar.add_task("training", total=total, completed=done, text="")


def _validation(row: dict[str, Any]) -> str:
    measures = [f", {name} {100 * share:.1f} %" for name, share in shares(row).items()]
    return f"validation {row['val_loss']:.3f}" + "".join(measures)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
