"""If a run is killed at any moment of saving, its ``latest`` is complete."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, checkpoint, zeros
from colossal_mpi.runtime.launcher import mpiexec_command

SAVER = """
import os, sys
from pathlib import Path
from colossal_mpi import Grid, Layout, checkpoint, comm, zeros

background, folder = sys.argv[1] == "background", Path(sys.argv[2])
grid = Grid(row=int(sys.argv[3]))
state = {f"w{i}": zeros((400, 1000), grid, Layout("row", None)) for i in range(3)}
saving = checkpoint.AsyncCheckpointer(grid)
(folder / f"pid{grid.rank}").write_text(str(os.getpid()))
for step in range(1, 10**6):
    saving.settle()
    for array in state.values():
        array.local[...] = step
    directory = folder / f"step-{step}"
    if background:
        def after(directory=directory, step=step):
            checkpoint.point_latest(directory)
            if step > 2:
                checkpoint.remove(folder / f"step-{step - 2}")
        saving.begin(directory, state, {"step": step}, after=after)
        saving.poll()
    else:
        checkpoint.save(directory, state, {"step": step}, grid)
        if grid.rank == 0:
            checkpoint.point_latest(directory)
            if step > 2:
                checkpoint.remove(folder / f"step-{step - 2}")
        comm.collect(None, grid)
"""


def started(folder, mode, ranks):
    """Start the program and wait for its first checkpoint."""
    command, env = mpiexec_command(ranks, [sys.executable, "-c", SAVER, mode, str(folder), str(ranks)])
    job = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "latest").exists():
        assert job.poll() is None, "the program ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return job


def alive(pid):
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def wait_until_gone(folder, ranks):
    deadline = time.monotonic() + 30
    for rank in range(ranks):
        pid = int((folder / f"pid{rank}").read_text())
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "ranks"), [("foreground", 1), ("background", 1), ("foreground", 2), ("background", 2)]
)
def test_latest_loads_whenever_a_rank_is_killed(tmp_path, mode, ranks):
    """The processes are killed at twenty moments, five for each way of saving."""
    grid, moment = Grid(MPI.COMM_SELF), random.Random(f"{mode}{ranks}")
    for trial in range(5):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        job = started(folder, mode, ranks)
        time.sleep(moment.uniform(0, 0.2))
        os.kill(int((folder / f"pid{moment.randrange(ranks)}").read_text()), signal.SIGKILL)
        job.wait(30)
        wait_until_gone(folder, ranks)
        state = {f"w{i}": zeros((400, 1000), grid, Layout(None, None)) for i in range(3)}
        step = checkpoint.load(folder / "latest", state, grid)["step"]
        assert step >= 1
        assert all((array.local == step).all() for array in state.values())
