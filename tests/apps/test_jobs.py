"""The scripts of ``jobs/`` are short, pass shellcheck, and run with an ``srun`` replaced by mpiexec."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import RUN
from tests.fakes import environment

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "jobs").iterdir())
NAMES = [path.name for path in SCRIPTS]
TINY = (
    """
[model]
layers = 1
hidden = 12
heads = 4
context = 8
[training]
steps = 1
batch = 4
evaluate_batches = 1
sample = 0
[parallel]
kernels = "reference"
"""
    + RUN
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path


def submit(name, *arguments, **more):
    """Run a script as sbatch does; return the finished process and the recorded calls of srun and scontrol."""
    env = environment(Path("bin").resolve()) | {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}
    env |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm", **more}
    Path("called").write_text("")
    command = ["bash", str(ROOT / "jobs" / name), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    return done, Path("called").read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_script_is_short_and_clean(script):
    lines = script.read_text().splitlines()
    assert len(lines) < 40
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert os.access(script, os.X_OK)
    beside = Path(sys.executable).with_name("shellcheck")
    linter = str(beside) if beside.exists() else shutil.which("shellcheck")
    command = [linter] if linter else ["bash", "-n"]
    checked = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=30)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "arguments", "more", "run"),
    [
        ("cpu.slurm", ["tiny.toml", "--grid", "row=2,col=2", "--tensor", "2d"], {}, "run"),
        ("grids.slurm", ["tiny.toml"], {"SLURM_ARRAY_TASK_ID": "3"}, "runs/grid-3d"),
    ],
)
def test_a_script_trains(folder, name, arguments, more, run):
    done, called = submit(name, *arguments, **more)
    assert done.returncode == 0, done.stderr
    assert (folder / run / "checkpoints" / "latest").exists()
    assert "option --mpi=pmi2\n" in called
    assert "SRUN_CPUS_PER_TASK=1\n" in called


def test_mpirun_needs_no_scheduler(folder):
    done, _ = submit("mpirun.sh", "2", "tiny.toml", "--grid", "data=2")
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize("name", ["gpu.slurm", "gpu-aware.slurm"])
def test_a_gpu_script_shows_all_gpus_to_every_rank(folder, name):
    done, called = submit(name, "demo", FAKE_CODE="0")
    assert done.returncode == 0, done.stderr
    assert "option --gpu-bind=none\ncolossal-mpi train --set parallel.device=cuda demo\n" in called
    assert ("COLOSSAL_MPI_CUDA_AWARE=1\n" in called) == ("aware" in name)


def test_a_stopped_run_is_requeued_and_resumed(folder):
    done, called = submit("requeue.slurm", "long", "demo", FAKE_CODE="85")
    assert done.returncode == 0, done.stderr
    assert "colossal-mpi train demo --overwrite --set run.directory=long\n" in called
    assert called.endswith("scontrol requeue 7\n")
    (folder / "long" / "checkpoints" / "latest").mkdir(parents=True)
    done, called = submit("requeue.slurm", "long", "demo", FAKE_CODE="1")
    assert done.returncode == 1
    assert "colossal-mpi train --resume long\n" in called
    assert "scontrol" not in called
