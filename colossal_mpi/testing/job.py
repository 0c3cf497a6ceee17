"""One ``mpiexec`` of `colossal_mpi.testing.worker`: start it, read the files of its ranks, end it.

`colossal_mpi.testing.runner` starts and ends jobs, and `colossal_mpi.testing.watch` reads the files of the ranks. The
module calls the launcher of ``runtime``.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colossal_mpi.runtime import launcher

MARK = "COLOSSAL_MPI_JOB"
# SIGUSR1 will not do: the library answers it itself, and mpiexec forwards it.
DUMP_SIGNAL = signal.SIGUSR2
ENVIRONMENT = {
    "OMPI_MCA_pml": "ob1",  # without these Open MPI looks for network providers for a second
    "OMPI_MCA_btl": "self,sm",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # every rank would search through all installed packages
}
NOT_FOR_RANKS = ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE")


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class RankLog:
    """The output of one rank so far: the tests that it has started, their reports, and its end."""

    def __init__(self, directory: Path, rank: int):
        self.path, self.stack_path = directory / f"rank{rank}.jsonl", directory / f"rank{rank}.stacks"
        self.pid: int | None = None
        self.last: str | None = None
        self.started: dict[str, float] = {}
        self.failed: dict[str, float] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.ended: str | None = None
        self._offset = 0

    def read(self) -> None:
        """Read the lines that are new and complete."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            self._take(**json.loads(line))

    def _take(self, event: str, time: float, value: Any) -> None:
        if event == "pid":
            self.pid = value
        elif event == "start":
            self.last = value
            self.started[value] = time
        elif event == "end":
            self.ended = value
        else:
            self.reports.setdefault(value["nodeid"], {})[value["when"]] = value
            if value["outcome"] == "failed" or (value["outcome"] == "skipped" and "wasxfail" in value):
                self.failed.setdefault(value["nodeid"], time)

    def stack(self) -> str:
        """Return the stacks that the rank has dumped, without thread numbers and pytest's own frames."""
        text = self.stack_path.read_text() if self.stack_path.exists() else ""
        text = re.sub(r"(?m)^( +File .*/_pytest/.*\n)(?: +File .*(?:\n|$))*", "", text)
        text = text.partition("\nExtension modules:")[0]
        return re.sub(r"(hread) 0x\w+", r"\1", text).strip()


class Job:
    """A running ``mpiexec``.

    Parameters
    ----------
    directory : Path
        A directory that is created; it holds the worker's input and the files of the ranks.
    spec : dict
        The input of the worker: ``tests`` (node ids), ``files``, ``ranks``, ``options`` (of pytest), ``prepared``.
    cwd : Path
        The working directory of the ranks.
    """

    def __init__(self, directory: Path, spec: dict[str, Any], cwd: Path):
        directory.mkdir()
        (directory / "spec.json").write_text(json.dumps(spec))
        self.directory, self.tests, self.size = directory, set(spec["tests"]), spec["ranks"]
        self.ranks = {rank: RankLog(directory, rank) for rank in range(self.size)}
        worker = [sys.executable, "-m", f"{__package__}.worker", str(directory)]
        command, needed = launcher.mpiexec_command(self.size, worker)
        environment = launcher.child_environment(os.environ)
        kept = {name: value for name, value in environment.items() if name not in NOT_FOR_RANKS}
        with (directory / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=ENVIRONMENT | kept | needed | {MARK: str(directory)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def read(self) -> None:
        """Read the new lines of all ranks."""
        for log in self.ranks.values():
            log.read()

    def began(self) -> bool:
        """Return whether any rank has begun a test."""
        return any(log.last for log in self.ranks.values())

    def inside(self, test: str) -> list[int]:
        """Return the ranks that have not finished the test."""
        return [rank for rank, log in self.ranks.items() if "teardown" not in log.reports.get(test, {})]

    def output(self, lines: int = 40) -> str:
        """Return the last lines that mpiexec and the ranks have printed outside of tests."""
        text = (self.directory / "output.txt").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def dump(self, ranks: Iterable[int]) -> dict[int, str]:
        """Return the stacks of some ranks, by rank; a dead rank has one only if it crashed."""
        living = self.processes()
        asked = [self.ranks[rank] for rank in ranks if self.ranks[rank].pid in living]
        for log in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(log.pid or 0, DUMP_SIGNAL)
        limit = time.monotonic() + 2
        while not all(log.stack() for log in asked) and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.1 if asked else 0)  # for the rest of a stack that is being written
        return {rank: self.ranks[rank].stack() for rank in ranks if self.ranks[rank].stack()}

    def processes(self) -> set[int]:
        """Return the ids of the processes, mpiexec among them, that have this job's mark in their environment."""
        mark, found = f"{MARK}={self.directory}\0".encode(), set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.add(int(path.parent.name))
        return found

    def finish(self, patience: float = 5.0) -> None:
        """Wait for the job to end by itself, for `patience` seconds, then kill what is left."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.kill()

    def kill(self) -> None:
        """Kill every process of the job, the ranks first, so that mpiexec can remove its own files."""
        if self.process.poll() is None:
            _kill({log.pid for log in self.ranks.values() if log.pid} & self.processes())
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        self.process.kill()
        self.process.wait()
        limit = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < limit:
            _kill(left)
            time.sleep(0.02)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
