"""One job at a time writes a run directory, which others can read; a killed job leaves it unlocked."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossal_mpi import ConfigError
from colossal_mpi.apps.run_directory import Lock
from colossal_mpi.runtime.launcher import mpiexec_command
from tests.command_line import RUN

CLI = [sys.executable, "-m", "colossal_mpi.apps.cli"]
SMALL = (
    """
[model]
layers = 1
hidden = 8
heads = 2
context = 8
[training]
steps = 1000000
batch = 2
evaluate_every = 1000000
evaluate_batches = 1
checkpoint_every = 50
sample = 0
[parallel]
kernels = "reference"
"""
    + RUN
)


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Start an endless run of one rank, which leaves a core to others, and wait until it has saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    (tmp_path / "small.toml").write_text(SMALL)
    command, env = mpiexec_command(1, [*CLI, "train", "small.toml"])
    with subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as job:
        try:
            await_(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), job)
            yield job
        finally:
            job.kill()


def await_(condition, job, limit=60):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        assert job.poll() is None
        time.sleep(0.05)


def call(*arguments):
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_a_second_writer_is_refused_until_the_first_is_gone(training):
    refused = [
        call("train", "small.toml"),
        call("train", "small.toml", "--overwrite"),
        call("train", "--resume", "run"),
    ]
    said = r"colossal_mpi: error: run is being written by process (\d+) on \S+, SLURM_JOB_ID=42: wait until it ends, or"
    found = [re.match(said, one.stderr) for one in refused]
    assert all(found), [one.stderr for one in refused]
    assert [(one.returncode, one.stderr.count("\n")) for one in refused] == [(1, 1)] * 3
    for reader in (["report", "run"], ["inspect", "run"], ["generate", "run", "-n", "1"]):
        assert call(*reader).returncode == 0, reader
    (process,) = {int(match[1]) for match in found}
    os.kill(process, signal.SIGKILL)
    training.wait(20)
    assert Path("run/lock").stat().st_size > 0  # the killed job left its text
    steps = int(Path("run/checkpoints/latest").resolve().name.removeprefix("step-")) + 1
    again = call("train", "--resume", "run", "--set", f"training.steps={steps}")
    assert again.returncode == 0, again.stderr
    assert Path("run/lock").stat().st_size == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_spoken_of(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    Lock(tmp_path).release()
    assert re.search(
        "warning: .* is on a file system without locks .*: see to it that no other", capsys.readouterr().err
    )


def test_a_holder_that_has_not_said_who_it_is_is_another_job(tmp_path, monkeypatch):
    def lockf(*_):
        raise PermissionError(errno.EACCES, "held")

    (tmp_path / "lock").write_text('{"process": 1')
    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(ConfigError, match="is being written by another job: wait"):
        Lock(tmp_path)
    assert (tmp_path / "lock").read_text() == '{"process": 1'
