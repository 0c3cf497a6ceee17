"""The output of rank 0 during a run: a progress bar or lines, metrics, the report, event files.

The training loop makes a `Report` on rank 0. It appends metrics to the run directory and draws with ``apps.report``.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from colossal_mpi.apps import report as reports
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.environment import peak_memory
from colossal_mpi.apps.files import write_output
from colossal_mpi.apps.report.runs import flat, shares
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.text import binary, duration
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import ConfigError


def check(config: Config) -> None:
    """Refuse a run whose event files cannot be written.

    Raises
    ------
    ConfigError
        If the configuration asks for them and the package is missing.
    """
    if config.run.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "run.tensorboard=true needs tensorboardX: pip install colossal-mpi[tensorboard], or leave it out"
        )


class Report:
    """Shows the progress of a run, as a bar at a terminal, elsewhere as a line every few steps, and writes its metrics.

    Parameters
    ----------
    trainer : Trainer
        The trainer of the run.
    directory : RunDirectory
        The directory for metrics, sample and report.
    done : int
        Number of steps that are done already.
    """

    def __init__(self, trainer: Trainer, directory: RunDirectory, done: int) -> None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an ASCII terminal cannot show all characters of a sample
        self.training, self.directory, self.done = trainer.config.training, directory, done
        self.unit = trainer.task.unit
        self.console, self.begun = Console(markup=False, soft_wrap=True), time.perf_counter()
        self.bar: Any
        self.task: Any
        self.bar, self.task = _bar(self.console, self.training.steps, done) if sys.stdout.isatty() else (None, None)
        self.events = _Events(directory, done) if trainer.config.run.tensorboard else None
        self.before, self.draws = trainer.before, trainer.config.run.report
        parallel, task = trainer.config.parallel, trainer.task
        self._say(
            f"{task.name} of {trainer.parameters:,} parameters, {parallel.dtype}, tensor {parallel.tensor} on "
            f"{trainer.grid}, {trainer.kernels} kernels; {task.about}"
        )
        if done:
            changed = changes(trainer.restored.get("config", {}), trainer.config.model_dump())
            data = trainer.data_change()
            changed += [f"data, {data}"] if data else []
            told = f"; changed: {', '.join(changed)}" if changed else ""
            self._say(f"goes on after step {done} and {trainer.samples(done):,} samples{told}")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def step(self, row: dict[str, Any]) -> None:
        """Write the metrics of a step and show them."""
        self.directory.append(row)
        if self.events:
            self.events.write(row)
        new = row["step"] - self.done
        left = (time.perf_counter() - self.begun) / new * (self.training.steps - row["step"])
        text = f"loss {row['loss']:.3f}  {row[f'{self.unit}_per_second']:,.0f} {self.unit}/s"
        if self.bar:
            self.bar.update(self.task, completed=row["step"], text=text)
        if "val_loss" in row:
            self._say(f"step {row['step']:5d}/{self.training.steps}  {text}  {_validation(row)}")
        elif not self.bar and (row["step"] % self.training.log_every == 0 or new == 1):
            self._say(f"step {row['step']:5d}/{self.training.steps}  {text}  {_clock(left)} left")

    def recovered(self, text: str, done: int) -> None:
        """Say how the run goes on after a step that was not finite, from a step that may lie before it.

        Parameters
        ----------
        text : str
            What was found, and what is done about it.
        done : int
            Number of steps that are done from now on.
        """
        self.done = min(self.done, done)
        self._say(text)

    def finish(self, text: bytes, forecast: Mapping[str, Any] | None) -> None:
        """Write the sample and, if asked, the report; print the forecast beside the measurement, and the paths."""
        self.close()
        grown = peak_memory() - self.before  # before the report loads matplotlib
        if forecast is not None:
            self.directory.write_facts(self.directory.facts() | {"predicted": forecast})
        if self.draws:
            reports.write([self.directory.path])
        write_output(self.directory.sample, text)
        if text:
            self._say("sample: " + text.decode(errors="replace").strip("\n"))
        if forecast is not None:
            self._say(_compared(forecast, self.directory.rows(), grown))
        checkpoint = self.directory.checkpoints / self.directory.latest().name
        drawn = f"report {self.directory.page}, " if self.draws else ""
        self._say(f"{drawn}metrics {self.directory.metrics}, checkpoint {checkpoint}")

    def stop(self, number: int) -> None:
        """Say that a signal has stopped the run, and how to resume it."""
        self.close()
        name = signal.Signals(number).name
        self._say(f"stopped by {name} after {self.directory.latest().name}: go on with --resume {self.directory.path}")

    def close(self) -> None:
        """End the bar: while it is live, what goes to stderr is written to stdout."""
        if self.bar:
            self.bar.stop()
        if self.events:
            self.events.writer.close()


class _Events:
    """Writes metrics as event files for TensorBoard, which hides earlier events of steps that are done again."""

    def __init__(self, directory: RunDirectory, done: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(directory.events), purge_step=done + 1 if done else None)

    def write(self, row: dict[str, Any]) -> None:
        """Write each number of a row of metrics."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what a resumed run changes in its configuration, each change as ``section.key from old to new``.

    Keys that only one of the versions of colossal_mpi has are left out.
    """
    old, new = dict(flat(before)), dict(flat(now))
    return [f"{key} from {old[key]!r} to {new[key]!r}" for key in new if key in old and old[key] != new[key]]


def _bar(console: Console, total: int, done: int) -> tuple[Any, Any]:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    bar.start()
    return bar, bar.add_task("training", total=total, completed=done, text="")


def _validation(row: dict[str, Any]) -> str:
    measures = [f", {name} {100 * share:.1f} %" for name, share in shares(row).items()]
    return f"validation {row['val_loss']:.3f}" + "".join(measures)


def _compared(forecast: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], grown: int) -> str:
    """Return one line with rank 0's forecast, the figures of the last rows of metrics, and the growth of memory."""
    words, seconds = rows[-1]["words_received"], median(row["seconds"] for row in rows)
    return (
        f"predicted and measured, rank 0: words of a step {forecast['words']:,} and {words:,}; step "
        f"{duration(forecast['seconds'])} and {duration(seconds)}; memory of arrays {binary(forecast['memory'])}, "
        f"by which the process grew {binary(grown)}"
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
