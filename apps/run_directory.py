"""A run directory: its files, which checkpoints it keeps, and the lock that lets one job at a time write it.

Training writes it, and the report, ``inspect`` and the demo read it. Its files are ``config.toml``, ``run.json``,
``metrics.jsonl``, ``sample.txt``, ``trace.json``, ``tokenizer.json``, ``lock``, and the folders ``checkpoints``,
``report`` and ``events``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from colossal_mpi import files
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.files import write_output, writing
from colossal_mpi.checkpoint import point_latest, read_manifest, remove
from colossal_mpi.errors import CheckpointError, ColossalError, ConfigError
from colossal_mpi.runtime import JOB_ID_VARIABLES

_HELD = (errno.EACCES, errno.EAGAIN)
_LARGEST_NAME, _LARGEST_METRICS = 1 << 10, 1 << 34
"""Greatest sizes in bytes of a file ``latest`` and of the metrics."""

PLOTS = ("loss", "measures", "speed", "utilisation", "rate", "gradient", "scale", "memory", "words", "timeline")
"""The names of the pictures of a report."""


class RunDirectory:
    """The files of one run. Rank 0 alone writes them, and has the lock; all ranks write checkpoints.

    Parameters
    ----------
    path : str or Path
        The directory. It need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.metrics = self.path / "config.toml", self.path / "metrics.jsonl"
        self.checkpoints, self.page = self.path / "checkpoints", self.path / "report" / "index.html"
        self.plot = self.page.with_name("loss.png")
        self.sample, self.trace = self.path / "sample.txt", self.path / "trace.json"
        self.about, self.tokenizer = self.path / "run.json", self.path / "tokenizer.json"
        self.events = self.path / "events"
        self._lock: Lock | None = None

    @classmethod
    def of(cls, path: str | Path) -> tuple[RunDirectory, Path | None]:
        """Return the run that a user names by its directory or by one of its checkpoints.

        Parameters
        ----------
        path : str or Path
            The directory of a run, or that of a checkpoint in its folder ``checkpoints``.

        Returns
        -------
        run : RunDirectory
            The run.
        checkpoint : Path or None
            The checkpoint; None if the directory of the run was named.
        """
        run, folder = cls(path), Path(path).absolute()
        if run.config.is_file() or folder.parent.name != "checkpoints" or not folder.is_dir():
            return run, None
        of_folder = cls(Path(path).parent.parent if Path(path).parent.name else folder.parent.parent)
        return (of_folder, folder.resolve()) if of_folder.config.is_file() else (run, None)

    def hold(self) -> None:
        """Keep other jobs from writing this run until `release` is called or the process ends.

        Raises
        ------
        ConfigError
            If another job writes the run, or the directory cannot be written.
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
        """Make the directory of a new run and `hold` it.

        Parameters
        ----------
        config : Config
            The configuration of the run.
        overwrite : bool
            Whether to replace a run that the directory holds.
        tokenizer : str
            The JSON of the tokenizer; ``""`` where tokens are bytes.

        Raises
        ------
        ConfigError
            If the directory holds a run and `overwrite` is not set, if another job writes it, or if it cannot be
            written.
        """
        if self.config.exists() and not self.checkpoints.is_dir():
            raise ConfigError(f"{self.config} belongs to no run: choose another folder with --set run.directory=...")
        self.hold()
        if self.config.exists() and not overwrite:
            self.release()
            begun = bool(self._saved()) or self._named() is not None
            found = f": go on with --resume {self.path}, " if begun else ", which has no checkpoint: "
            raise ConfigError(
                f"{self.path} holds a run already{found}replace it with --overwrite, or choose another with --set "
                "run.directory=..."
            )
        try:
            if self.config.exists():
                self._clear()
            self.page.parent.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.write_config(config)
            if tokenizer:
                write_output(self.tokenizer, tokenizer)
        except (OSError, ValueError) as problem:
            raise self._unwritable(problem) from None

    def write_config(self, config: configs.Config) -> None:
        """Write the configuration of the run.

        Parameters
        ----------
        config : Config
            The configuration that the run has from now on.
        """
        write_output(self.config, configs.dump(config))

    def _clear(self) -> None:
        """Remove the files of a former run, and nothing else."""
        for _, folder in self._saved():
            remove(folder)
        latest = self.checkpoints / "latest"
        if latest.is_dir() and not latest.is_symlink():
            remove(latest)
        self._sweep()
        for file in self.events.glob("events.out.tfevents.*"):
            file.unlink()
        written = (
            self.config,
            self.about,
            self.tokenizer,
            self.metrics,
            self.sample,
            self.trace,
            self.page,
            latest,
        )
        for file in (*written, *(self.page.parent / f"{name}.png" for name in PLOTS)):
            file.unlink(missing_ok=True)

    def _saved(self) -> list[tuple[int, Path]]:
        """Return the checkpoints in order, each with the number of steps that it has done."""
        names = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in self.checkpoints.glob("step-*"))
        return sorted((int(match[1]), path) for match, path in names if match and path.is_dir())

    def _named(self) -> Path | None:
        """Return the checkpoint that ``latest`` names, None if it names none.

        Copies of a run may resolve links: ``latest`` is then a directory with the same checkpoint, or a file with its
        name.
        """
        latest = self.checkpoints / "latest"
        if latest.is_symlink() or not latest.exists():
            found = latest.resolve()
            if latest.exists() and not found.is_relative_to(self.checkpoints.resolve()):
                raise CheckpointError(f"{latest} is a link out of {self.checkpoints}: name a checkpoint beside it")
            return found if latest.exists() else None
        try:
            name = files.read_bytes(latest, _LARGEST_NAME).decode().strip() if latest.is_file() else ""
            found = self.checkpoints / name if name else self.checkpoint(int(read_manifest(latest)["metadata"]["step"]))
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):  # a copy that was interrupted
            return None
        if found.parent == self.checkpoints and found.is_dir():
            return found.resolve()
        return None if name else latest.resolve()

    def latest(self) -> Path:
        """Return the newest checkpoint: the one that ``latest`` names, or the last one if it names none.

        Returns
        -------
        Path
            The directory of the checkpoint.

        Raises
        ------
        CheckpointError
            If there is no run or no checkpoint.
        """
        if not self.config.is_file():
            raise CheckpointError(f"no run to resume at {self.path}: it has no {self.config.name}")
        named, saved = self._named(), self._saved()
        if named is not None:
            return named
        if not saved:
            raise CheckpointError(f"{self.path} has no checkpoint yet: start it anew with --overwrite")
        return saved[-1][1]

    def others(self, source: Path) -> list[Path]:
        """Return the checkpoints of the run besides one, the newest first.

        Parameters
        ----------
        source : Path
            The one that is left out.

        Returns
        -------
        list of Path
            Their directories.
        """
        return [path for _, path in reversed(self._saved()) if path.resolve() != source.resolve()]

    def saved(self) -> list[int]:
        """Return the steps that the checkpoints have done.

        Returns
        -------
        list of int
            In order; empty without checkpoints.
        """
        return [step for step, _ in self._saved()]

    def checkpoint(self, step: int) -> Path:
        """Return the directory of a checkpoint.

        Parameters
        ----------
        step : int
            Number of steps that are done.

        Returns
        -------
        Path
            The directory, whether it exists or not.
        """
        return self.checkpoints / f"step-{step:07d}"

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Write the facts that do not change while the run goes on, to ``run.json``.

        Parameters
        ----------
        facts : dict
            Machine, model, peak flop/s and others, as JSON has them.
        """
        write_output(self.about, json.dumps(facts, indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """Return the facts of ``run.json``.

        Returns
        -------
        dict
            The facts; empty if the run has none.
        """
        try:
            facts = files.parse_json(files.read_bytes(self.about))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def keep(self, step: int, keep_last: int, keep_every: int) -> None:
        """Point ``latest`` to the checkpoint after `step` steps and remove those that need not be kept.

        Parameters
        ----------
        step : int
            Number of steps that are done.
        keep_last : int
            Number of newest checkpoints to keep; 0 keeps all.
        keep_every : int
            Checkpoints at multiples of this many steps are kept, too; 0 for none.
        """
        point_latest(self.checkpoint(step))
        self._sweep()
        older = self._saved()[:-keep_last] if keep_last else []
        for old, directory in older:
            if old != step and not (keep_every and old % keep_every == 0):
                remove(directory)

    def _sweep(self) -> None:
        """Remove the remains of checkpoints that a job was writing or removing when it crashed."""
        for pattern in (".step-*.partial", ".step-*.removed", ".latest.removed"):
            for left in self.checkpoints.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to the metrics.

        Parameters
        ----------
        row : dict
            The metrics of a step, ``step`` among them.
        """
        text = json.dumps(row, allow_nan=False) + "\n"
        with writing(self.metrics):
            files.append(self.metrics, text)

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics, without a last line that a crash has cut short.

        A crash of the machine can also leave blank lines, zero bytes or parts of lines. Such lines are left out, and a
        warning on stderr tells their number.

        Returns
        -------
        list of dict
            A row for each step, with ``step`` among its keys.
        """
        text = ""
        if self.metrics.exists():
            text = files.read_bytes(self.metrics, _LARGEST_METRICS).decode(errors="replace")
        lines = text.split("\n")[:-1]  # what follows the last line break was cut short
        found = [_row(line) for line in lines]
        damaged = found.count(None)
        if damaged:
            told = f"{damaged} damaged line{'s' * (damaged > 1)} of {len(lines)} left out"
            sys.stderr.write(f"colossal_mpi: warning: {self.metrics}: {told}\n")
        return [row for row in found if row is not None]

    def rewind(self, steps: int) -> None:
        """Remove the metrics and checkpoints after a step, to which ``latest`` points from then on.

        A resumed run does the steps after it again. Where ``latest`` itself is the directory of the checkpoint, as in
        the copy of a run, it gets the name of its step.

        Parameters
        ----------
        steps : int
            Number of steps that are done.
        """
        kept = [row for row in self.rows() if row["step"] <= steps]
        write_output(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        later = [path for step, path in self._saved() if step > steps]
        if later:
            names = ", ".join(path.name for path in later)
            sys.stderr.write(f"colossal_mpi: warning: {self.path} goes on after step {steps}: {names} removed\n")
        for path in later:
            remove(path)
        latest, reached = self.checkpoints / "latest", self.checkpoint(steps)
        if latest.is_dir() and not latest.is_symlink() and not reached.exists():
            latest.rename(reached)
        if reached.is_dir():
            point_latest(reached)
        self._sweep()


def _row(line: str) -> dict[str, Any] | None:
    """Return the row of metrics on a line, None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


class Lock:
    """The lock of a run directory. A process has it until `release` is called or the process ends, however it ends.

    Parameters
    ----------
    directory : Path
        An existing directory. Its file ``lock`` names the process that has the lock.

    Raises
    ------
    ConfigError
        If another process has the lock.

    Notes
    -----
    This is a record lock of POSIX. NFS, and Lustre if it is mounted with ``flock``, enforce it between hosts; they do
    not enforce the locks of ``flock`` everywhere. The system releases it when the process ends, and a file server when
    the client ends.
    On a file system without locks, a warning is printed and nothing is locked. The file is never removed: a job could
    lock the removed file while another one locks its successor. A process must not open the file a second time, since
    closing it releases the lock.

    References
    ----------
    POSIX.1-2017, ``fcntl``: "All locks associated with a file for a given process shall be removed when a file
    descriptor for that file is closed by that process or the process holding that file descriptor terminates."
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        if path.is_symlink():  # of a copy of links: the lock is this directory's own
            path.unlink()
        self._file: IO[str] | None = os.fdopen(files.open_to_append(path), "a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in _HELD:
                holder = _holder(self._file)
                self._file.close()
                raise ConfigError(
                    f"{directory} is being written by {holder}: wait until it ends, or stop it; a new run can go "
                    "elsewhere with --set run.directory=..."
                ) from None
            sys.stderr.write(
                f"colossal_mpi: warning: {directory} is on a file system without locks ({problem.strerror}): see to it "
                "that no other job writes this run\n"
            )
        self._write(_this_process())

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            with suppress(OSError):  # a full disk: without the lock the text has no use
                self._write("")
            self._file.close()
            self._file = None

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())  # for readers on other hosts


def _this_process() -> str:
    jobs = [f"{name}={os.environ[name]}" for name in JOB_ID_VARIABLES if name in os.environ]
    return json.dumps({"process": os.getpid(), "host": platform.node(), "job": jobs[:1]})


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read(_LARGEST_NAME))
        return ", ".join([f"process {holder['process']} on {holder['host']}", *holder["job"]])
    except (ValueError, KeyError, TypeError):  # the holder is writing it right now
        return "another job"
