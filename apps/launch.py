"""Start a program on N ranks with the mpiexec that belongs to the MPI library that mpi4py uses."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial

from colossal_mpi.runtime.launcher import inherited, mpiexec_command

_SECOND_INTERRUPT = 3.0  # seconds
_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # USR1: the one that all mpiexecs hand to the ranks


def run(n: int, command: Sequence[str], dry_run: bool = False, settings: Mapping[str, str] | None = None) -> int:
    """Run a command on n ranks, and print the line that does the same without this program.

    SIGINT, SIGTERM and SIGUSR1 are handed on to mpiexec.

    Parameters
    ----------
    n
        Number of ranks.
    command
        A program and its arguments. A file that ends in ``.py`` is run by this Python.
    dry_run
        Print the line only.
    settings
        Environment variables to add for the job.

    Returns
    -------
    int
        The exit code of mpiexec; 128 + number if a signal ended it; 0 for a dry run.

    Raises
    ------
    ConfigError
        There is nothing to run, or n is below 1.
    LaunchError
        No mpiexec belongs to the MPI library, or this is itself a rank of a job.
    """
    argv, extra = mpiexec_command(n, command)
    extra |= settings or {}
    words = [f"{name}={shlex.quote(value)}" for name, value in extra.items()]
    print("$", *words, shlex.join(map(_short, argv)), file=sys.stderr, flush=True)
    return 0 if dry_run else _wait(argv, inherited(os.environ) | extra)


def _short(word: str) -> str:
    name = os.path.basename(word)
    return name if os.path.isabs(word) and shutil.which(name) == word else word


def _wait(argv: Sequence[str], env: Mapping[str, str]) -> int:
    received: list[int] = []
    jobs: list[subprocess.Popen] = []
    # Before the job starts: a signal that comes in between is handed on once there is one.
    before = {number: signal.signal(number, partial(_on_signal, jobs, received)) for number in _FORWARDED}
    try:
        with subprocess.Popen(argv, env=env) as job:
            jobs.append(job)
            for number in tuple(received):
                _forward(job, number)
            code = _patiently(job)
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    ended = [number for number in received if number != signal.SIGUSR1]
    if code == 0 and ended:
        return 128 + ended[0]  # MPICH's mpiexec says 0 now and then when it is interrupted
    return code if code >= 0 else 128 - code


def _patiently(job: subprocess.Popen) -> int:
    """Wait for a job in short spans: a signal that comes just before a wait without end would be handled after it."""
    while True:
        try:
            return job.wait(0.5)
        except subprocess.TimeoutExpired:
            pass


def _on_signal(jobs: list[subprocess.Popen], received: list[int], number: int, _frame: object) -> None:
    received.append(number)
    if jobs:
        _forward(jobs[0], number)


def _forward(job: subprocess.Popen, number: int) -> None:
    if number != signal.SIGINT:
        job.send_signal(number)
        return
    if not _in_foreground():  # else the terminal has sent it to mpiexec too, and two mean "kill at once"
        job.send_signal(number)
    # MPICH's mpiexec waits for ever for ranks that are inside an MPI call; the second one ends them.
    second = threading.Timer(_SECOND_INTERRUPT, job.send_signal, [number])
    second.daemon = True
    second.start()


def _in_foreground() -> bool:
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
