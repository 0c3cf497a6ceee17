"""The help of every command fits a screen and has an example; the commands start ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_mpi.apps.bench.attention import Attention
from colossal_mpi.apps.bench.gemm import Gemm
from colossal_mpi.apps.cli.program import program
from colossal_mpi.apps.cli.run import Run
from colossal_mpi.apps.cli.train import Train
from tests.command_line import call
from tests.documents import command, commands

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli"]


def start(*arguments):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("names", [[], *commands()], ids=lambda names: "-".join(names) or "root")
def test_help_fits_a_screen_and_has_an_example(names, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    program().main([*names, "--help"], prog_name="colossal-mpi", standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= width
    example = " ".join(" ".join(lines).partition("Example: ")[2].split())
    assert " ".join(["colossal-mpi", *names]) in example


@pytest.mark.parametrize("names", list(commands()), ids="-".join)
def test_the_summary_in_a_list_begins_the_help(names):
    listed = program()
    for name in names:
        listed = listed.commands[name]
    assert " ".join(command(names)[0].help.split()).startswith(listed.help)


def test_the_list_of_commands_loads_no_heavy_package():
    code = "import sys; sys.argv[1:] = ['--help']\nfrom colossal_mpi.apps.cli import main\n"
    code += "try: main()\nfinally: print({'torch', 'matplotlib', 'h5py', 'colossal_mpi.layers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Gemm(), []),
        (Gemm(size=["7,5,9", "8"], ranks=3), ["--size", "7,5,9", "--size", "8", "--ranks", "3"]),
        (Attention(causal=False, json=Path(os.devnull)), ["--no-causal", "--json", os.devnull]),
        (Train(config="demo", setting=["a.b=1"], dry_run=True), ["--set", "a.b=1", "--dry-run", "demo"]),
        (Train(resume="r"), ["--resume", "r"]),
        (Train(config="-x.toml", trace=2), ["--trace", "2", "--", "-x.toml"]),
        (Run(command=["a", "-n", "2"], ranks=4), ["-n", "4", "a", "-n", "2"]),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_a_command_is_turned_into_words_and_back(made, words, monkeypatch):
    assert made.arguments() == words
    parsed = []
    monkeypatch.setattr(type(made), "run", lambda self: parsed.append(self) or 0)
    assert type(made).parser("x").main(words, standalone_mode=False) == 0
    assert parsed == [made]


def test_run_prints_the_plain_line():
    result = start("run", "-n", "3", "--dry-run", "python", "-c", "print(1)")
    assert result.returncode == 0
    assert re.search(r"mpiexec( --\S+( none)?)* -n 3 \S*python -c 'print\(1\)'", result.stderr)


def test_run_starts_the_ranks_and_returns_their_exit_code():
    good = start("run", "-n", "2", sys.executable, "-c", "print('here')")
    bad = start("run", "-n", "2", sys.executable, "-c", "raise SystemExit(3)")
    assert (good.returncode, good.stdout.count("here")) == (0, 2)
    assert bad.returncode != 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["nonsense"],
        ["run", "-n", "0", "python"],
        ["train", "demo", "--resume", "x"],
        ["train", "--resume", "x", "--overwrite"],
        ["train", "demo", "--grid", ""],
        ["plan", "demo", "--ranks", "2", "--flops", "nan"],
        ["train", "demo", "--tensor", '2d" #'],
        ["train", "demo", "--set", "training.lr=1\ntraining.steps=2"],
        ["convert", "a", "b", "--to", "hf", "--most", "0"],
    ],
)
def test_a_wrong_call_is_one_line(arguments):
    result = call(*arguments)
    assert result.returncode != 0
    assert result.stderr.count("colossal_mpi: error:") == 1
    assert "Traceback" not in result.stderr


def test_help_lists_the_configurations_that_come_with_it():
    words = start("train", "--help").stdout.split()
    assert {"bert,", "demo,", "llama,", "vit."} <= set(words)


def test_a_group_without_a_command_prints_its_help_and_no_error():
    result = start("bench")
    assert result.returncode == 2
    assert "Usage: colossal-mpi bench" in result.stdout + result.stderr
    assert "error" not in result.stderr
