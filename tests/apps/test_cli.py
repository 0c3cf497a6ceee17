"""The command line: help of every command that fits a screen, with an example; launching."""

import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from colossal_mpi.apps.cli import main

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli"]


def call(*arguments):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)


def commands(group, *names):
    """Return the words of every command, groups included."""
    found = [list(names)]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, *names, name)
    return found


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", commands(typer.main.get_command(main.app)), ids=lambda c: "-".join(c) or "root")
def test_help_fits_a_screen_and_has_an_example(command, width):
    result = CliRunner().invoke(main.app, [*command, "--help"], env={"COLUMNS": str(width), "TERMINAL_WIDTH": ""})
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= width
    example = " ".join(" ".join(lines).partition("Example: ")[2].split())
    assert "colossal-mpi " + " ".join(command) in example


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
