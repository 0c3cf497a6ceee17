"""The example of a user's own model is short, names no mode, and trains in every mode with the losses of one rank."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from colossal_mpi import ConfigError, GridError
from colossal_mpi.apps.cli.arguments import from_command_line
from colossal_mpi.apps.examples import own_model
from colossal_mpi.layers import MODES
from colossal_mpi.runtime.launcher import mpiexec_command
from tests.reference.modes import few, parallelism

EXAMPLE = Path(own_model.__file__)
STEPS = 6


def prepare(path):
    from mpi4py import MPI

    from colossal_mpi import Grid
    from colossal_mpi.layers import Parallelism

    losses = list(own_model.train(Parallelism(Grid(MPI.COMM_SELF)), STEPS, "float64"))
    np.save(path / "losses.npy", losses)


def test_own_model_is_short_and_names_no_mode():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 42
    axes = {axis for mode in MODES.values() for axis in mode.axes}
    named = [
        word for word in (*MODES, *axes, "data") if f'"{word}"' in text or f"'{word}'" in text or f"{word}=" in text
    ]
    assert not named


@pytest.mark.prepare(prepare)
@few
def test_own_model_has_the_losses_of_one_rank(grid, prepared):
    check(grid, prepared)


@pytest.mark.prepare(prepare)
@pytest.mark.grids({"data": 2, "row": 2, "col": 2}, {"data": 2, "col": 2, "depth": 2}, {"data": 4})
def test_own_model_shares_its_batch_and_experts(grid, prepared):
    check(grid, prepared)


def check(grid, prepared):
    exact = np.load(prepared / "losses.npy")
    mine = np.array(list(own_model.train(parallelism(grid), STEPS, "float64")))
    assert np.max(abs(mine - exact) / exact) <= 1e-9
    assert exact[-1] < 0.9 * exact[0]


def start(ranks, *arguments):
    module = [sys.executable, "-m", "colossal_mpi.apps.examples.own_model", *arguments]
    command, env = mpiexec_command(ranks, module)
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)


def test_own_model_runs_as_a_program():
    grid = ("--grid", "data=2,row=2,col=2", "--tensor", "2d")
    result = start(8, *grid, "--steps", "2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [["step", "1", "loss"], ["step", "2", "loss"]]
    assert float(lines[0].split()[3]) == pytest.approx(np.log(256), abs=0.1)


def test_wrong_arguments_are_one_message_of_all_ranks():
    result = start(2, "--gird", "row=2")
    assert result.returncode != 0
    assert result.stderr.count("unrecognized arguments: --gird row=2") == 1
    assert "Traceback" not in result.stderr


def test_options_have_the_types_of_their_defaults():
    p, options = from_command_line(["--rate=0.5", "--steps", "3"], rate=1.0, steps=1, name="x")
    assert (p.tensor, options.rate, options.steps, options.name) == ("none", 0.5, 3, "x")
    with pytest.raises(ConfigError, match="argument --steps: invalid int value: 'few'"):
        from_command_line(["--steps", "few"], steps=1)
    with pytest.raises(GridError, match="needs 2 ranks and there are 1"):
        from_command_line(["--grid", "row=2", "--tensor", "2d"])
