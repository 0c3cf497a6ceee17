"""The check of GPUs counts the results of pytest, and passes where there is no GPU."""

import subprocess
import sys

import pytest

from colossal_mpi.apps.doctor import gpu_check
from colossal_mpi.apps.doctor.gpu_check import Row, run
from colossal_mpi.platform import backend


def test_it_says_so_and_passes_without_a_gpu():
    if backend.resolve_device("auto", 0) != "cpu":
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "colossal_mpi.apps.doctor.gpu_check"],
        cwd=gpu_check.TESTS.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to check" in done.stdout


CASES = """
import pytest

@pytest.mark.grids({"x": 1}, {"x": 2})
def test_device(grid):
    assert grid.device.startswith("fake") and grid.awareness.aware

@pytest.mark.grids({"x": 2})
def test_skipped(grid):
    pytest.skip("not today")

@pytest.mark.grids({"x": 2})
def test_failed(grid):
    assert not grid.awareness.aware

def test_without_a_grid():
    assert False
"""


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["colossal_mpi.testing.plugin"]\n')
    (tmp_path / "test_cases.py").write_text(CASES)
    return [tmp_path / "test_cases.py"]


def test_a_row_counts_the_tests_of_its_ranks_on_its_path(cases, capsys):
    two, one, none = (run("core", cases, ranks, True, "fake") for ranks in (2, 1, 3))
    assert (two.passed, two.failed, two.skipped) == (1, 1, 1)
    assert (one.passed, one.failed, one.skipped) == (1, 0, 0)
    assert (none.passed, none.failed, none.skipped) == (0, 0, 0)
    assert "test_failed" in capsys.readouterr().out
    staged = run("core", cases, 1, False, "fake")
    assert (staged.path, staged.failed) == ("staged", 1)


def test_a_run_that_ends_without_a_report_has_failed(tmp_path):
    row = run("core", [tmp_path / "nowhere"], 1, False, "fake")
    assert row.failed == 1


def test_rows_stand_below_the_head():
    assert len(str(Row("linalg", 4, "CUDA-aware", 1234, 0, 12, 1234.5))) == len(gpu_check.HEAD)
