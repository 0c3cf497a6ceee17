"""The pytest plugin reports each multi-rank test once, ends hangs and crashes, and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import pytest

HEAD = """
import os, signal, time
import pytest
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
"""

FINE = """
@pytest.mark.ranks(2)
def test_fine():
    pass
"""

# A shell that starts pytest in the background lets it ignore SIGINT.
CONFTEST = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
pytest_plugins = ["colossal_mpi.testing.plugin"]
"""


@dataclass
class Run:
    """The outcome of a pytest run of a generated file."""

    output: str
    seconds: float
    cases: dict[str, str]

    def block(self, test: str) -> str:
        """Return the text that is printed under the heading of a failed test."""
        return self.output.split(f" {test} ___", 1)[1].split("\n____", 1)[0]


def outcomes(report: Path) -> dict[str, str]:
    cases: dict[str, str] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = case.get("name")
        assert name
        assert name not in cases, f"{name} was reported twice"
        cases[name] = "+".join(child.tag for child in case if not child.tag.startswith("system")) or "passed"
    return cases


def left_behind(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.fixture
def start_pytest(tmp_path):
    mark = f"COLOSSAL_MPI_HARNESS={tmp_path}"
    started: list[subprocess.Popen] = []

    def start(body: str, *options: str) -> subprocess.Popen:
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_generated.py").write_text(HEAD + body)
        (tmp_path / "tmp").mkdir(exist_ok=True)
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        arguments = ["-rA", "--color=no", "--junitxml=report.xml", f"--rootdir={tmp_path}", *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "--import-mode=importlib", *arguments],
            cwd=tmp_path,
            env=os.environ | dict([mark.split("=")]) | {"PYTHONPATH": path, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    limit = time.monotonic() + 5
    while left_behind(mark) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not left_behind(mark)


@pytest.fixture
def pytest_run(tmp_path, start_pytest):
    def run(body: str, *options: str) -> Run:
        start = time.monotonic()
        process = start_pytest(body, *options)
        output, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - start
        assert not left_behind(f"COLOSSAL_MPI_HARNESS={tmp_path}")
        assert not list((tmp_path / "tmp").glob("colossal-mpi-*"))
        return Run(output, seconds, outcomes(tmp_path / "report.xml"))

    return run


def test_each_test_is_reported_once_with_its_name(pytest_run):
    run = pytest_run("""
@pytest.mark.ranks(4)
def test_four():
    assert comm.allreduce(1) == 4

@pytest.mark.ranks([1, 2])
def test_listed(ranks):
    assert size == ranks

@pytest.fixture
def grid(request):
    return request.param

@pytest.mark.grids({"row": 2, "col": 2}, {"p": 1}, {})
@pytest.mark.parametrize("a", ["x::y", "z"])
def test_grid(grid, a):
    assert size == (4 if "row" in grid else 1)

@pytest.mark.ranks(4)
def test_skipped():
    pytest.skip("not today")

@pytest.mark.ranks(4)
@pytest.mark.xfail(strict=True)
def test_expected_to_fail():
    assert rank != 2

@pytest.mark.ranks(2)
def test_shared(shared_path, tmp_path):
    (shared_path / str(rank)).touch()
    comm.barrier()
    assert len(list(shared_path.iterdir())) == 2
    assert len(set(comm.allgather(tmp_path))) == 2

def test_plain():
    assert size == 1
""")
    assert run.cases == {
        "test_four": "passed",
        "test_listed[1rank]": "passed",
        "test_listed[2ranks]": "passed",
        **{f"test_grid[{grid}-{a}]": "passed" for grid in ("row2-col2", "p1", "1rank") for a in ("x::y", "z")},
        "test_skipped": "skipped",
        "test_expected_to_fail": "skipped",
        "test_shared": "passed",
        "test_plain": "passed",
    }, run.output
    assert "not today" in run.output
    assert "11 passed, 1 skipped, 1 xfailed" in run.output


def test_failure_on_one_rank_ends_the_wait_of_the_others(pytest_run):
    run = pytest_run("""
@pytest.mark.ranks(3)
def test_before():
    comm.barrier()

@pytest.mark.ranks(3)
def test_planted():
    print("printed by", rank)
    if rank == 1:
        assert [rank] == ["planted"]
    comm.barrier()

@pytest.mark.ranks(3)
def test_all_ranks_fail():
    assert comm.allreduce(1) == 4

@pytest.mark.ranks(3)
def test_after():
    assert comm.allreduce(1) == 3
""")
    assert list(run.cases.values()) == ["passed", "failure", "failure", "passed"], run.output
    block = run.block("test_planted")
    assert "rank 1 of 3:" in block
    assert """assert [1] == ['planted']""" in block
    assert "3 s after the failure: ranks 0, 2 of 3 had not finished" in block
    assert block.count("in test_planted") == 1  # one stack for two ranks
    assert "Captured stdout call, rank 1 of 3" in block
    assert "ranks 0, 1, 2 of 3:" in run.block("test_all_ranks_fail")
    assert run.seconds < 40  # far below the default deadline


def test_hang_is_ended_at_its_deadline(pytest_run):
    run = pytest_run("""
def wait_for_nobody():
    comm.recv(source=1, tag=5)

@pytest.mark.ranks(2)
@pytest.mark.deadline(1)
def test_hangs():
    if rank == 0:
        wait_for_nobody()

@pytest.fixture
def hanging():
    wait_for_nobody()

@pytest.mark.ranks(2)
def test_hangs_in_setup(hanging):
    pass

@pytest.mark.ranks(2)
def test_after():
    assert comm.allreduce(1) == 2
""", "-o", "mpi_deadline=2")  # fmt: skip
    assert list(run.cases.values()) == ["failure", "error", "passed"], run.output
    block = run.block("test_hangs")
    assert "the deadline of 1 s passed: rank 0 of 2 had not finished the test" in block
    assert "rank 1 of 2: past the test" in block
    assert "in wait_for_nobody" in block
    assert "the deadline of 2 s passed: ranks 0, 1 of 2" in run.output
    assert run.seconds < 40


def test_death_of_a_rank_is_blamed_on_its_test(pytest_run):
    run = pytest_run("""
@pytest.mark.ranks(2)
def test_slow_on_one_rank():
    if rank == 0:
        time.sleep(0.5)

@pytest.mark.ranks(2)
def test_exits():
    if rank == 1:
        os._exit(7)

@pytest.mark.ranks(2)
def test_killed():
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.barrier()

@pytest.mark.ranks(2)
def test_after():
    assert comm.allreduce(1) == 2
""")
    assert list(run.cases.values()) == ["passed", "failure", "failure", "passed"], run.output
    assert run.output.count("the MPI job died (mpiexec ended with status") >= 2
    assert run.seconds < 40


def test_job_that_cannot_start_is_an_error_of_all_its_tests(pytest_run):
    run = pytest_run("""
if size > 1:
    raise RuntimeError("not on two ranks")

@pytest.mark.ranks(2)
def test_one():
    pass

@pytest.mark.ranks(2)
def test_two():
    pass

def test_plain():
    pass
""")
    assert list(run.cases.values()) == ["error", "error", "passed"], run.output
    assert run.output.count("RuntimeError: not on two ranks") >= 2


def test_files_of_one_directory_share_a_job_and_a_broken_one_fails_alone(pytest_run, tmp_path):
    (tmp_path / "test_fine.py").write_text(HEAD + FINE)
    run = pytest_run("""
if size > 1:
    raise RuntimeError("not on two ranks")

@pytest.mark.ranks(2)
def test_one():
    pass
""")
    assert run.cases == {"test_fine": "passed", "test_one": "error"}, run.output


def test_two_files_run_in_one_job(pytest_run, tmp_path):
    (tmp_path / "test_fine.py").write_text(HEAD + FINE)
    run = pytest_run("""
import sys

@pytest.mark.ranks(2)
def test_other_file():
    assert any(name.endswith("test_fine") for name in sys.modules)
""")
    assert run.cases == {"test_fine": "passed", "test_other_file": "passed"}, run.output


def test_prepare_runs_once_and_its_failure_is_an_error(pytest_run, tmp_path):
    run = pytest_run("""
def reference(path):
    assert size == 1
    with open("count", "a") as file:
        file.write("x")
    (path / "reference.txt").write_text("torch says 42")

def planted(path):
    raise ValueError("no reference")

@pytest.mark.prepare(reference)
@pytest.mark.ranks([1, 2, 3])
def test_reads(prepared):
    assert "42" in (prepared / "reference.txt").read_text()

@pytest.mark.prepare(planted)
@pytest.mark.ranks([1, 2])
def test_lacks(prepared):
    pass
""")
    assert [run.cases[f"test_reads[{n}]"] for n in ("1rank", "2ranks", "3ranks")] == ["passed"] * 3, run.output
    assert [run.cases[f"test_lacks[{n}]"] for n in ("1rank", "2ranks")] == ["error"] * 2
    assert run.output.count(">       raise ValueError") == 2
    assert (tmp_path / "count").read_text() == "x"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["test_generated.py::test_c"], ["test_c"]),
        (["-k", "test_a or test_c"], ["test_a", "test_c"]),
        (["-m", "smoke"], ["test_b"]),
        (["-x", "--deselect", "test_generated.py::test_a"], ["test_b"]),
    ],
    ids=["node-id", "k", "m", "x-deselect"],
)
def test_selection(pytest_run, tmp_path, options, expected):
    pytest_run("""
with open(f"ran{rank}", "a") as file:
    file.write(f"{size} ")

@pytest.mark.ranks(2)
def test_a(): pass

@pytest.mark.smoke
@pytest.mark.ranks(2)
def test_b(): assert size == 3

@pytest.mark.ranks(2)
def test_c(): pass
""", *options)  # fmt: skip
    assert list(outcomes(tmp_path / "report.xml")) == expected
    assert (tmp_path / "ran1").read_text() == "2 "  # one job


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_nothing_outlives_pytest(start_pytest, tmp_path, number):
    process = start_pytest("""
@pytest.mark.ranks(2)
def test_waits():
    open(f"inside{rank}", "w").close()
    comm.recv(source=1 - rank)
""")
    limit = time.monotonic() + 20
    while len(list(tmp_path.glob("inside*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 2, signal.SIGKILL: -9}[number], output
    assert len(list(tmp_path.glob("inside*"))) == 2


@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2}, {"row": 1, "col": 3}, {"p": 1})
def test_grid_has_all_ranks(grid, ranks, request):
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size == ranks == grid.size
    assert dict(grid.axes) == request.node.callspec.params["grid"]


def test_reader_waits_for_whole_lines(tmp_path):
    from colossal_mpi.testing.job import RankLog

    log = RankLog(tmp_path, 0)
    log.read()
    lines = [{"event": "pid", "time": 1.0, "value": 11}, {"event": "start", "time": 2.0, "value": "t"}]
    text = "\n".join(map(json.dumps, lines)) + "\n"
    log.path.write_text(text[:-5])
    log.read()
    assert (log.pid, log.started) == (11, {})
    log.path.write_text(text)
    log.read()
    assert log.started == {"t": 2.0}
