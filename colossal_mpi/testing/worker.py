"""One rank of a test job: ``python -m colossal_mpi.testing.worker DIRECTORY``.

`colossal_mpi.testing.job` starts it under mpiexec. It runs pytest in process and writes the events to a file, which the
parent reads.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from .job import DUMP_SIGNAL, die_with_parent
from .store import STORE, Store


class Recorder:
    """A pytest plugin that selects the tests of the job and writes their reports to a file, a JSON object a line."""

    def __init__(self, directory: Path, rank: int, spec: dict[str, Any]):
        self._file = (directory / f"rank{rank}.jsonl").open("w", buffering=1)
        self._tests: list[str] = spec["tests"]
        self._store = Store(Path(spec["prepared"]), directory / "shared", writes=False)
        self._config: pytest.Config

    def write(self, event: str, value: Any) -> None:
        """Append a line with the time, whose clock is the same in all processes of a machine."""
        record = {"event": event, "time": time.monotonic(), "value": value}
        self._file.write(json.dumps(record, default=str) + "\n")

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Mark this process as a rank, for the plugin, which is configured next."""
        config.stash[STORE] = self._store
        self._config = config

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        """Keep the tests of the job, in its order."""
        yield
        collected = {item.nodeid: item for item in items}
        if missing := [test for test in self._tests if test not in collected]:
            raise pytest.UsageError(f"collected by the parent but not by this rank: {', '.join(missing)}")
        items[:] = [collected[test] for test in self._tests]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Print why a file cannot be collected, for the parent to show."""
        if report.failed:
            print(report.longreprtext, file=sys.__stderr__)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test starts."""
        self.write("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the report of a phase."""
        hook = self._config.hook
        self.write("report", hook.pytest_report_to_serializable(config=self._config, report=report))


def main(directory: Path) -> None:
    """Run the tests that ``spec.json`` in a directory lists."""
    die_with_parent()
    spec = json.loads((directory / "spec.json").read_text())
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    if size != spec["ranks"]:
        sys.exit(f"mpiexec started {spec['ranks']} ranks, MPI sees {size}: they are not of one MPI library")
    stacks = (directory / f"rank{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(DUMP_SIGNAL, stacks, all_threads=True)
    recorder = Recorder(directory, rank, spec)
    recorder.write("pid", os.getpid())
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (pytest's own terminal output; the parent reports)
    tmp = f"--basetemp={directory / f'tmp{rank}'}"
    status = pytest.main([*spec["options"], tmp, *spec["files"]], plugins=[recorder])
    recorder.write("end", f"pytest ended with status {int(status)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
