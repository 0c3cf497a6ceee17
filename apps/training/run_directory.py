"""A run directory: ``config.toml``, ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``report/``, and others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from colossal_mpi.apps import config as configs
from colossal_mpi.apps.training.lock import Lock
from colossal_mpi.checkpoint import point_latest, remove
from colossal_mpi.errors import CheckpointError, ColossalError, ConfigError

PLOTS = ("loss", "measures", "speed", "utilisation", "rate", "gradient", "scale", "memory", "words", "timeline")
"""Names of the pictures of a report."""


class RunDirectory:
    """The files of one run. Written by rank 0 alone, which has the lock; checkpoints by all ranks."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.toml", self.path / "metrics.jsonl"
        self.checkpoints, self.page = self.path / "checkpoints", self.path / "report" / "index.html"
        self.plot = self.page.with_name("loss.png")
        self.sample, self.trace = self.path / "sample.txt", self.path / "trace.json"
        self.about, self.tokenizer = self.path / "run.json", self.path / "tokenizer.json"
        self.events = self.path / "events"
        self._lock: Lock | None = None

    def hold(self) -> None:
        """Keep other jobs from writing this run, as long as this object or process lives, or until `release`.

        Raises
        ------
        ConfigError
            If another job writes it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path)
        except ColossalError:
            raise
        except (OSError, ValueError) as problem:  # a name may have a zero byte
            raise self._unwritable(problem) from None

    def release(self) -> None:
        """Let other jobs write this run."""
        if self._lock is not None:
            self._lock.release()

    def _unwritable(self, problem: Exception) -> ConfigError:
        reason = getattr(problem, "strerror", None) or problem
        return ConfigError(f"run.directory={str(self.path)!r} cannot be written: {reason}")

    def create(self, config: configs.Config, overwrite: bool, tokenizer: str = "") -> None:
        """Make and `hold` the directory of a new run; it has the JSON of its tokenizer, unless tokens are bytes.

        Raises
        ------
        ConfigError
            If it holds a run already and `overwrite` is not set, another job writes it, or it cannot be written.
        """
        if self.config.exists() and not self.checkpoints.is_dir():
            raise ConfigError(f"{self.config} is not that of a run: choose another folder with --set run.directory=...")
        self.hold()
        if self.config.exists() and not overwrite:
            self.release()
            raise ConfigError(
                f"{self.path} holds a run already: go on with --resume {self.path}, replace it with --overwrite, "
                "or choose another with --set run.directory=..."
            )
        try:
            if self.config.exists():
                self._clear()
            self.page.parent.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.write_config(config)
            if tokenizer:
                self.tokenizer.write_text(tokenizer, encoding="utf-8")
        except (OSError, ValueError) as problem:
            raise self._unwritable(problem) from None

    def write_config(self, config: configs.Config) -> None:
        """Write the configuration that the run has from now on."""
        self.config.write_text(configs.dump(config), encoding="utf-8")

    def _clear(self) -> None:
        """Remove what a former run wrote, and nothing else that may lie there."""
        for _, folder in self._saved():
            remove(folder)
        self._sweep()
        for file in self.events.glob("events.out.tfevents.*"):
            file.unlink()
        files = (
            self.config,
            self.about,
            self.tokenizer,
            self.metrics,
            self.sample,
            self.trace,
            self.page,
            self.checkpoints / "latest",
        )
        for file in (*files, self.checkpoints / "latest", *(self.page.parent / f"{name}.png" for name in PLOTS)):
            file.unlink(missing_ok=True)

    def _saved(self) -> list[tuple[int, Path]]:
        """Return the checkpoints and the steps behind them, in order."""
        names = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in self.checkpoints.glob("step-*"))
        return sorted((int(match[1]), path) for match, path in names if match)

    def latest(self) -> Path:
        """Return the newest checkpoint: that of the link ``latest``, or the last one if the link is broken.

        Raises
        ------
        CheckpointError
            If there is no run or no checkpoint.
        """
        if not self.config.is_file():
            raise CheckpointError(f"no run to resume at {self.path}: it has no {self.config.name}")
        latest, saved = self.checkpoints / "latest", self._saved()
        if latest.exists():
            return latest.resolve()
        if not saved:
            raise CheckpointError(f"{self.path} has no checkpoint yet: start it anew with --overwrite")
        return saved[-1][1]

    def checkpoint(self, step: int) -> Path:
        """Return the place of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:07d}"

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write what does not change while the run goes on: machine, model, peak."""
        self.about.write_text(json.dumps(facts, indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """Return what `write_facts` has written; nothing of a run of a version that did not."""
        try:
            facts = json.loads(self.about.read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def made(self, step: int, keep_last: int, keep_every: int) -> None:
        """Point ``latest`` to the checkpoint after `step` steps and remove those that need not be kept.

        Parameters
        ----------
        step : int
        keep_last : int
            Newest checkpoints that stay; 0 keeps all.
        keep_every : int
            Those after a multiple of so many steps stay as well; 0 for none.
        """
        point_latest(self.checkpoint(step))
        self._sweep()
        older = self._saved()[:-keep_last] if keep_last else []
        for old, directory in older:
            if old != step and not (keep_every and old % keep_every == 0):
                remove(directory)

    def _sweep(self) -> None:
        """Remove what a crash has left of checkpoints that were being written or removed."""
        for left in (*self.checkpoints.glob(".step-*.partial"), *self.checkpoints.glob(".step-*.removed")):
            shutil.rmtree(left, ignore_errors=True)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics; a last line that a crash has cut short is left out."""
        text = self.metrics.read_text() if self.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def rewind(self, steps: int) -> None:
        """Forget what came after `steps` steps: a resumed run does those again."""
        kept = [row for row in self.rows() if row["step"] <= steps]
        whole = self.metrics.with_suffix(".partial")
        whole.write_text("".join(json.dumps(row) + "\n" for row in kept))
        whole.replace(self.metrics)
        for step, later in self._saved():
            if step > steps:
                remove(later)
        self._sweep()
