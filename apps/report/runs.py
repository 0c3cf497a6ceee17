"""The recorded runs that a report shows, read from their directories, whatever version wrote them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from colossal_mpi import files
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.errors import ConfigError

Row = dict[str, Any]


def shares(row: Row) -> dict[str, float]:
    """Return the measures of a validation that are shares of the samples, by name: ``accuracy`` of ``val_accuracy``."""
    names = [name for name in row if name.startswith("val_") and name != "val_loss"]
    return {name.removeprefix("val_").replace("_", " "): row[name] for name in names}


@dataclass(frozen=True)
class Run:
    """A recorded run; fields that its version did not record are empty."""

    name: str
    rows: list[Row]
    config: dict[str, Any]
    """The configuration, by ``section.key``."""
    facts: dict[str, Any]
    """The facts that `colossal_mpi.apps.training.meter.Meter` writes about the run."""
    trace: list[dict[str, Any]]
    """The events of ``trace.json``."""

    @cached_property
    def unit(self) -> str:
        """The unit of the speed, in the plural: ``tokens``."""
        names = [name for name in self.rows[-1] if name.endswith("_per_second")]
        return names[0].removesuffix("_per_second") if names else str(self.facts.get("unit", "samples"))

    @property
    def per(self) -> str:
        """The unit that the loss is a mean over: ``token``."""
        return str(self.facts.get("per") or self.unit.removesuffix("s"))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps that have a number under `key`, and the numbers."""
        found = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> Any:
        """Return the last value under `key`, None if there is none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def median(self, key: str) -> float | None:
        """Return the median over the steps, without the first of several steps, which is slow."""
        values = self.series(key)[1]
        return median(values[1:] or values) if values else None

    @cached_property
    def gathered(self) -> list[dict[str, list[Any]]]:
        """The figures of all ranks, once for each time that the run gathered them."""
        return [row["ranks"] for row in self.rows if "ranks" in row]

    def words(self) -> dict[str, int]:
        """Return the array elements that all ranks received in the last gathered step, by axes."""
        return {} if not self.gathered else _sums(self.gathered[-1]["words"])

    def seconds(self) -> dict[str, float]:
        """Return the seconds that a rank spent in communication in a step, by axes, as a mean over ranks and steps."""
        sums = [_sums(ranks["seconds"]) for ranks in self.gathered]
        size = len(self.gathered[-1]["seconds"]) if sums else 1
        return {axis: fmean(one.get(axis, 0.0) for one in sums) / size for axis in (sums[-1] if sums else {})}


def _sums(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over ranks of numbers by axes, without the empty name, over which nothing moves."""
    axes = dict.fromkeys(axis for one in ranks for axis in one if axis)
    return {axis: sum(one.get(axis, 0) for one in ranks) for axis in axes}


def read(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in these directories.

    Raises
    ------
    ConfigError
        If one is not the directory of a run, its run has no step yet, or a file cannot be read.
    """
    names = list(_names([Path(os.path.abspath(path)) for path in paths]))
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a name for each run: the shortest end of its path that no other path has."""
    for path in paths:
        ends = (str(Path(*path.parts[-n:])) for n in range(1, len(path.parts) + 1))
        yield next((end for end in ends if sum(str(other).endswith(f"/{end}") for other in paths) == 1), str(path))


def _read(path: Path, name: str) -> Run:
    directory = RunDirectory(path)
    try:
        config = files.parse_toml(files.read_bytes(directory.config, files.LARGEST_CONFIG).decode())
        rows, trace = directory.rows(), _events(directory.trace)
    except FileNotFoundError:
        raise ConfigError(f"no run at {path}: it has no {directory.config.name}; give the directory of a run") from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ConfigError(f"the run at {path} cannot be read: {problem}") from None
    if not rows:
        raise ConfigError(f"the run at {path} has done no step yet: {directory.metrics.name} has no rows")
    return Run(name, rows, dict(flat(config)), directory.facts(), trace)


def _events(trace: Path) -> list[dict[str, Any]]:
    """Return the events of a trace; if the file is damaged, warn and return none."""
    if not trace.exists():
        return []
    try:
        events: list[dict[str, Any]] = files.parse_json(files.read_bytes(trace))["traceEvents"]
        return events
    except (OSError, ValueError, KeyError, TypeError):
        sys.stderr.write(f"colossal_mpi: warning: {trace} is damaged: the report has no timeline\n")
        return []


def flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a configuration as ``section.key``, each with its value."""
    for key, value in table.items():
        if isinstance(value, dict) and key != "grid":
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
