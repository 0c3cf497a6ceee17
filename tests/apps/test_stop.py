"""A signal stops all ranks of a run after the same step, with a checkpoint and the exit code; it resumes bitwise."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi.apps.training.stopping import CODE, Stop
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.runtime.launcher import mpiexec_command
from tests.command_line import RUN

SMALL = (
    """
[model]
layers = 1
hidden = 12
heads = 3
context = 8
dropout = 0.1
[training]
steps = 100000
batch = 5
warmup = 0
rate = "constant"
evaluate_every = 100000
evaluate_batches = 1
checkpoint_every = 100000
log_every = 1
sample = 0
[parallel]
grid = { data = 2 }
kernels = "reference"
"""
    + RUN
)
CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "train"]
OPEN_MPI = MPI.get_vendor()[0] == "Open MPI"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Run:
    """A run on two ranks that ends at a deadline; what it prints goes to files, which are never full."""

    def __init__(self, *arguments, **more):
        command, env = mpiexec_command(2, [*CLI, *arguments])
        env = {**os.environ, "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm", **env, **more}
        with open("out", "w") as out, open("err", "w") as err:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)
        self.deadline = time.monotonic() + 60

    def seen(self, name, text):
        """Wait until the run has written a text to a file."""
        while not Path(name).exists() or text not in Path(name).read_text():
            if self.process.poll() is not None or time.monotonic() > self.deadline:
                self.process.kill()
                raise AssertionError(Path("out").read_text() + Path("err").read_text())
            time.sleep(0.02)
        return self

    def ended(self):
        try:
            code = self.process.wait(self.deadline - time.monotonic())
        finally:
            self.process.kill()  # ranks end with it
        return code, Path("out").read_text(), Path("err").read_text()


def rank_pid(rank):
    """Return the process of one rank of the job in this folder."""
    name = "OMPI_COMM_WORLD_RANK" if OPEN_MPI else "PMI_RANK"
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = Path(os.readlink(path / "cwd")) == Path.cwd()
            if here and f"{name}={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
    raise AssertionError(f"no rank {rank}")


def state(step):
    with h5py.File(f"run/checkpoints/step-{step:07d}/index.h5") as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        return {name: file[name][...] for name in names}


def rows():
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_a_signal_to_one_rank_stops_all_after_one_step_and_resumes_bitwise(folder):
    run = Run("small.toml").seen("run/metrics.jsonl", "loss")
    run.process.send_signal(signal.SIGUSR1)  # this signal asks for a status and stops nothing
    for rank in (0, 1):
        run.seen("err", f"rank {rank} of 2 on {os.uname().nodename}: the last")
    os.kill(rank_pid(1), signal.SIGTERM)
    code, out, err = run.ended()
    assert code == CODE, err
    done = rows()[-1]["step"]
    assert f"stopped by SIGTERM after step-{done:07d}: go on with --resume run" in out
    assert [row["step"] for row in rows()] == list(range(1, done + 1))
    assert "Traceback" not in err
    assert re.search(r"the last \d+ collectives, the oldest first:\n.*: +(bcast|allgather) over data, ", err)
    end = ["--set", f"training.steps={done + 2}"]
    code, _, err = Run("--resume", "run", *end).ended()
    assert code == 0, err
    resumed, losses = state(done + 2), [row["loss"] for row in rows()]
    code, _, err = Run("small.toml", "--overwrite", *end).ended()
    assert code == 0, err
    exact = state(done + 2)
    assert set(resumed) == set(exact)
    assert all(np.array_equal(resumed[name], exact[name]) for name in exact)
    assert [row["loss"] for row in rows()] == losses


def test_the_signal_that_mpiexec_hands_on_stops_the_run(folder):
    number, more = (signal.SIGUSR1, {"COLOSSAL_MPI_STOP_SIGNAL": "USR1"}) if OPEN_MPI else (signal.SIGTERM, {})
    run = Run("small.toml", **more).seen("run/metrics.jsonl", "loss")
    run.process.send_signal(number)
    code, out, err = run.ended()
    assert code == CODE, err
    assert f"stopped by {number.name} after step-" in out


def test_a_signal_asks_only_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with Grid(data=1) as grid, Stop(grid) as stop:
        stop.vote()
        assert stop.decided() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        stop.vote()
        assert stop.decided() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_signal_is_refused(monkeypatch):
    monkeypatch.setenv("COLOSSAL_MPI_STOP_SIGNAL", "TERM, KILL")
    with Grid(data=1) as grid, pytest.raises(ConfigError, match="use TERM, USR1, USR2, HUP"):
        Stop(grid)
