"""The tree of commands that ``colossal-mpi`` and ``python -m colossal_mpi.apps.cli`` run.

Each command is one class in one module, here or in ``apps.bench``. `LazyCommand` imports it when it is called, so that
a list of commands needs no import; the summaries below are the first sentences of their help.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

from colossal_mpi.apps.command import LazyCommand
from colossal_mpi.errors import ColossalError, ConfigError
from colossal_mpi.grid import world_size

# Newer versions of typer bring their own click, older ones use the installed one.
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_COMMANDS = (
    ("run", "run:Run", "Start COMMAND on several ranks with the mpiexec of the MPI library in use."),
    ("train", "train:Train", "Train a model on text or images."),
    ("plan", "plan:Plan", "Find the fastest grid, modes and schedule for a model, and explain them."),
    ("report", "report:Report", "Draw one run, or several runs on the same axes, as PNG files and one HTML page."),
    ("doctor", "doctor:Doctor", "Examine MPI, launcher, cores, GPUs, disk and network, and say what to do."),
    ("inspect", "inspect:Inspect", "Show what a checkpoint holds and whether it is whole, or how two of them differ."),
    ("convert", "convert:Convert", "Convert weights between Hugging Face directories and checkpoints, bit for bit."),
    ("generate", "generate:Generate", "Continue text with a GPT or a Llama, on any grid."),
)
_BENCHMARKS = (
    ("gemm", "gemm:Gemm", "Time every matrix product beside NumPy and ScaLAPACK."),
    ("attention", "attention:Attention", "Measure the memory and time of attention as the sequence grows."),
    ("train", "train:Train", "Time the training step of a GPT beside PyTorch eager."),
    ("optimizers", "optimizers:Optimizers", "Train one model with several optimizers, and compare validation losses."),
    (
        "pipeline",
        "pipeline:Pipeline",
        "Measure how long the stages of a GPT wait under every pipeline schedule.",
    ),
    ("checkpoint", "checkpoint:Checkpoint", "Time saving and loading beside plain writing and reading of files."),
)
_DATA = (
    ("prepare", "data:Prepare", "Write the tokens of texts of any size to a store, which data.files takes."),
    ("inspect", "data:Inspect", "Show the tokens, documents, vocabulary and some text of a store."),
)
_app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@_app.callback(invoke_without_command=True, epilog="Example: colossal-mpi run -n 4 colossal-mpi train demo")
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Distributed linear algebra and parallel deep learning on MPI."""
    if show_version:
        typer.echo(version("colossal-mpi"))
        raise typer.Exit


def program() -> TyperGroup:
    """Return ``colossal-mpi`` with all its commands."""
    root = typer.main.get_command(_app)
    assert isinstance(root, TyperGroup)
    root.name = "colossal-mpi"
    _add(root, "cli", _COMMANDS)
    bench = _group("bench", "Measure speed beside other libraries.", "colossal-mpi bench gemm --size 2048")
    data = _group("data", "Turn texts into tokens, and look at them.", "colossal-mpi data prepare *.txt corpus.h5")
    _add(bench, "bench", _BENCHMARKS)
    _add(data, "cli", _DATA)
    root.add_command(bench)
    root.add_command(data)
    return root


def _group(name: str, summary: str, example: str) -> TyperGroup:
    epilog = f"Example: {example}"
    return TyperGroup(name=name, help=summary, epilog=epilog, no_args_is_help=True, rich_markup_mode="rich")


def _add(group: TyperGroup, package: str, commands: tuple[tuple[str, str, str], ...]) -> None:
    for name, where, summary in commands:
        group.add_command(LazyCommand(name, f"colossal_mpi.apps.{package}.{where}", summary))


def main() -> None:
    """Run the command line; an error of the user is one message and a non-zero exit code of the whole job."""
    try:
        code = program().main(prog_name="colossal-mpi", standalone_mode=False)
    except typer.Abort:
        code = 130
    except _ClickException as problem:
        if not str(problem):  # a group without a command has printed its help
            sys.exit(2)
        _fail(ConfigError(f"{problem} (see colossal-mpi --help)"))
    except ColossalError as problem:
        _fail(problem)
    sys.exit(code or 0)


def _fail(problem: ColossalError) -> None:
    if world_size() > 1:
        raise problem from None  # the guards print it once for the job
    sys.stderr.write(f"colossal_mpi: error: {problem}\n")
    sys.exit(1)
