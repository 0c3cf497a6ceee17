"""The tests of core, linalg and layers on GPU blocks, with a table of the results: ``make gpu-check``.

Ranks share one GPU. Each group of tests runs on 1, 2 and 4 ranks, once with blocks staged through host memory and, if
MPI reads GPU memory, once without staging. Nothing is installed; without CuPy or a GPU it says so and exits with 0.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from mpi4py import MPI

from colossal_mpi.errors import GridError
from colossal_mpi.platform import backend, cuda_aware

TESTS = Path(__file__).resolve().parents[2] / "tests"
GROUPS = ("core", "linalg", "layers")
RANKS = (1, 2, 4)
NEEDED = ("pytest", "array_api_strict", "torch")
# The first run compiles each kernel for each dtype, on every rank at once.
_DEADLINE = 300


@dataclass(frozen=True)
class Row:
    """The results of one group of tests on a number of ranks."""

    group: str
    ranks: int
    path: str
    passed: int
    failed: int
    skipped: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.group:<8}{self.ranks:>6}  {self.path:<11}{self.passed:>7}{self.failed:>7}{self.skipped:>8}"
            f"{self.seconds:>9.1f}"
        )


HEAD = f"{'tests':<8}{'ranks':>6}  {'blocks':<11}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>9}"


def run(group: str, tests: Sequence[str | Path], ranks: int, aware: bool, device: str = "cuda") -> Row:
    """Run tests in a separate pytest, and return the results; print the output if a test failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", f"--device={device}", f"--ranks={ranks}", "-p", "no:warnings"]
        command += [f"--junitxml={report}", "-o", f"mpi_deadline={_DEADLINE}", *map(str, tests)]
        env = os.environ | {cuda_aware.VARIABLE: str(int(aware))}
        done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True, check=False)
        row = _row(report, group, ranks, "CUDA-aware" if aware else "staged")
    # 5: no test asks for this number of ranks
    if row.failed or done.returncode not in (0, 5):
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
        row = Row(group, ranks, row.path, row.passed, max(1, row.failed), row.skipped, row.seconds)
    return row


def _row(report: Path, group: str, ranks: int, path: str) -> Row:
    suites = list(ElementTree.parse(report).getroot().iter("testsuite")) if report.exists() else []

    def total(name: str) -> int:
        return sum(int(suite.get(name, 0)) for suite in suites)

    failed, skipped = total("failures") + total("errors"), total("skipped")
    seconds = sum(float(suite.get("time", 0)) for suite in suites)
    return Row(group, ranks, path, total("tests") - failed - skipped, failed, skipped, seconds)


def missing() -> str | None:
    """Return the reason why nothing can be checked here; None if something can."""
    if importlib.util.find_spec("cupy") is None:
        return "no CuPy in this Python: nothing to check (extras cuda12, cuda13)"
    try:
        backend.resolve_device("cuda", 0)
    except GridError:
        return "no GPU that CuPy can use: nothing to check"
    return None


def rows(aware: bool) -> Iterator[Row]:
    """Run every group on all numbers of ranks, staged and, with `aware`, without staging as well."""
    for group in GROUPS:
        for ranks in RANKS:
            for path in (False, True) if aware else (False,):
                yield run(group, [TESTS / group], ranks, path)


def main() -> int:
    """Print the table; return 1 if a test failed."""
    reason = missing()
    if reason is not None:
        print(f"gpu-check: {reason}")
        return 0
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking or not TESTS.is_dir():
        print(f"gpu-check: run it from a checkout, with {', '.join(lacking) or 'its tests'} (extra test)")
        return 1
    known = cuda_aware.find("cuda:0")
    library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    print(f"Python {sys.version.split()[0]}; {backend.describe_gpu()}; {library}\nMPI: {known}\n\n{HEAD}", flush=True)
    failed = 0
    for row in rows(known.aware):
        print(row, flush=True)
        failed += row.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
