"""A run directory: ``config.toml``, ``metrics.jsonl``, ``checkpoints/``, ``report/`` and ``sample.txt``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from colossal_mpi.apps import config as configs
from colossal_mpi.errors import CheckpointError, ConfigError


class RunDirectory:
    """The files of one run. Written by rank 0 alone; checkpoints by all ranks."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.toml", self.path / "metrics.jsonl"
        self.checkpoints, self.plot = self.path / "checkpoints", self.path / "report" / "loss.png"
        self.sample = self.path / "sample.txt"

    def create(self, config: configs.Config, overwrite: bool) -> None:
        """Make the directory of a new run.

        Raises
        ------
        ConfigError
            If it holds a run already and `overwrite` is not set, or it cannot be written.
        """
        if self.config.exists() and not overwrite:
            raise ConfigError(
                f"{self.path} holds a run already: go on with --resume {self.path}, replace it with --overwrite, "
                "or choose another with --set run.directory=..."
            )
        try:
            if self.config.exists():
                self._clear()
            self.plot.parent.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.config.write_text(configs.dump(config))
        except OSError as problem:
            raise ConfigError(f"run.directory={str(self.path)!r} cannot be written: {problem.strerror}") from None

    def _clear(self) -> None:
        """Remove the files of a former run, and nothing else that may lie there."""
        for folder in (self.checkpoints, self.plot.parent):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.metrics, self.sample):
            file.unlink(missing_ok=True)

    def latest(self) -> Path:
        """Return the newest checkpoint.

        Raises
        ------
        CheckpointError
            If there is no run or no checkpoint.
        """
        if not self.config.is_file():
            raise CheckpointError(f"no run to resume at {self.path}: it has no {self.config.name}")
        latest = self.checkpoints / "latest"
        if not latest.exists():
            raise CheckpointError(f"{self.path} has no checkpoint yet: start it anew with --overwrite")
        return latest.resolve()

    def checkpoint(self, step: int) -> Path:
        """Return the place of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:07d}"

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

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
        for later in self.checkpoints.glob("step-*"):
            if int(later.name.partition("-")[2]) > steps:
                shutil.rmtree(later)
