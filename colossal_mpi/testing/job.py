"""One ``mpiexec`` of :mod:`colossal_mpi.testing.worker`: start it, read its ranks' files, end it."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colossal_mpi.runtime import launcher

from .ranklog import RankLog

MARK = "COLOSSAL_MPI_JOB"
# Not SIGUSR1: the library catches that one for preemption, and mpiexec forwards it.
DUMP_SIGNAL = signal.SIGUSR2
ENVIRONMENT = {
    "OMPI_MCA_pml": "ob1",  # without these Open MPI looks for network providers for a second
    "OMPI_MCA_btl": "self,sm",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a search through every installed package, on every rank
}
NOT_FOR_RANKS = ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE")


def die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Job:
    """A running ``mpiexec``.

    Parameters
    ----------
    directory : Path
        Made here; holds what the ranks are told and what they write.
    spec : dict
        For the worker: ``tests`` (node ids), ``files``, ``ranks``, ``options`` (of pytest), ``prepared``.
    cwd : Path
        Where the ranks start.
    """

    def __init__(self, directory: Path, spec: dict[str, Any], cwd: Path):
        directory.mkdir()
        (directory / "spec.json").write_text(json.dumps(spec))
        self.directory, self.tests, self.size = directory, set(spec["tests"]), spec["ranks"]
        self.ranks = {rank: RankLog(directory, rank) for rank in range(self.size)}
        worker = [sys.executable, "-m", f"{__package__}.worker", str(directory)]
        command, needed = launcher.mpiexec_command(self.size, worker)
        kept = {name: value for name, value in launcher.inherited(os.environ).items() if name not in NOT_FOR_RANKS}
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
        """Take in what the ranks have written."""
        for log in self.ranks.values():
            log.read()

    def began(self) -> bool:
        """Say whether any rank has begun a test."""
        return any(log.last for log in self.ranks.values())

    def inside(self, test: str) -> list[int]:
        """Return the ranks that have not finished the test."""
        return [rank for rank, log in self.ranks.items() if "teardown" not in log.reports.get(test, {})]

    def output(self, lines: int = 40) -> str:
        """Return the end of what mpiexec and the ranks have printed outside of tests."""
        text = (self.directory / "output.txt").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def dump(self, ranks: Iterable[int]) -> dict[int, str]:
        """Return the stacks of those ranks; a dead rank has one only after a crash."""
        living = self.processes()
        asked = [self.ranks[rank] for rank in ranks if self.ranks[rank].pid in living]
        for log in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(log.pid or 0, DUMP_SIGNAL)
        limit = time.monotonic() + 2
        while not all(log.stack() for log in asked) and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.1 if asked else 0)  # a stack that has begun may not be whole
        return {rank: self.ranks[rank].stack() for rank in ranks if self.ranks[rank].stack()}

    def processes(self) -> set[int]:
        """Return the processes that carry this job's mark in their environment, mpiexec among them."""
        mark, found = f"{MARK}={self.directory}\0".encode(), set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    found.add(int(path.parent.name))
        return found

    def finish(self, patience: float = 5.0) -> None:
        """Let the job end by itself, then make sure that it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.kill()

    def kill(self) -> None:
        """End every process of the job: the ranks first, for mpiexec to remove its own files."""
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
