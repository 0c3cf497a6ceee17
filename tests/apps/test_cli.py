"""The command line: help that fits a screen, examples, and launching."""

import re
import subprocess
import sys

import pytest

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli"]


def call(*arguments):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "command", [[], ["run"], ["train"], ["convert"], ["bench", "gemm"]], ids=lambda c: c[-1] if c else "root"
)
def test_help_fits_a_screen(command):
    result = call(*command, "--help")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) <= 40
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not command or "Example:" in result.stdout


def test_run_prints_the_plain_line():
    result = call("run", "-n", "3", "--dry-run", "python", "-c", "print(1)")
    assert result.returncode == 0
    assert re.search(r"mpiexec( --\S+( none)?)* -n 3 \S*python -c 'print\(1\)'", result.stderr)


def test_run_starts_the_ranks_and_returns_their_exit_code():
    good = call("run", "-n", "2", sys.executable, "-c", "print('here')")
    bad = call("run", "-n", "2", sys.executable, "-c", "raise SystemExit(3)")
    assert (good.returncode, good.stdout.count("here")) == (0, 2)
    assert bad.returncode != 0


@pytest.mark.parametrize(
    "arguments", [["train"], ["nonsense"], ["run", "-n", "0", "python"], ["train", "demo", "--resume", "x"]]
)
def test_a_wrong_call_is_one_line(arguments):
    result = call(*arguments)
    assert result.returncode != 0
    assert result.stderr.count("colossal_mpi: error:") == 1
    assert "Traceback" not in result.stderr


def test_help_lists_the_configurations_that_come_with_it():
    words = call("train", "--help").stdout.split()
    assert {"bert,", "demo,", "llama,", "vit."} <= set(words)
