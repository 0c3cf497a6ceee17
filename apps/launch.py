"""Start a program on N ranks with the mpiexec that belongs to the MPI library of mpi4py.

``colossal-mpi run`` and the commands that start ranks themselves call `run`. It gets the command line from ``runtime``,
starts mpiexec and forwards signals to it.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from colossal_mpi.runtime import child_environment, mpiexec_command

_SECOND_INTERRUPT = 3.0  # seconds
_FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
)  # every mpiexec forwards USR1 to the ranks


def run(n: int, command: Sequence[str], dry_run: bool = False, settings: Mapping[str, str] | None = None) -> int:
    """Run a command on n ranks, and print the shell line that does the same.

    SIGINT, SIGTERM and SIGUSR1 are forwarded to mpiexec, SIGHUP as SIGTERM. If this process is killed, mpiexec gets
    SIGTERM.

    Parameters
    ----------
    n : int
        The number of ranks.
    command : sequence of str
        A program and its arguments. This Python runs a file that ends in ``.py``.
    dry_run : bool, default False
        Whether to print the line and start nothing.
    settings : mapping of str to str, optional
        Environment variables to add for the job.

    Returns
    -------
    int
        The exit code of mpiexec; 128 + number if a signal ended it; 0 for a dry run.

    Raises
    ------
    ConfigError
        If there is nothing to run, or n is below 1.
    LaunchError
        If no mpiexec belongs to the MPI library, or this process is itself a rank of a job.
    """
    argv, extra = mpiexec_command(n, command)
    extra |= settings or {}
    words = [f"{name}={shlex.quote(value)}" for name, value in extra.items()]
    print("$", *words, shlex.join(map(_short, argv)), file=sys.stderr, flush=True)
    return 0 if dry_run else _wait(argv, child_environment(os.environ) | extra)


def _short(word: str) -> str:
    name = os.path.basename(word)
    return name if os.path.isabs(word) and shutil.which(name) == word else word


def _wait(argv: Sequence[str], env: Mapping[str, str]) -> int:
    received: list[int] = []
    jobs: list[subprocess.Popen[bytes]] = []
    # The handlers exist before the job starts; a signal that comes in between is forwarded once the job has started.
    numbers = [
        number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN
    ]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, partial(_on_signal, jobs, received)) for number in numbers}
    try:
        with subprocess.Popen(argv, env=env, preexec_fn=_die_with_parent(os.getpid())) as job:
            jobs.append(job)
            for number in tuple(received):
                _forward(job, number)
            code = _patiently(job)
    finally:
        for number, action in before.items():
            signal.signal(number, action)
    ended = [number for number in received if number != signal.SIGUSR1]
    if code == 0 and ended:
        return 128 + ended[0]  # MPICH's mpiexec sometimes returns 0 when it is interrupted
    return code if code >= 0 else 128 - code


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """Return what a child does before it becomes another program, so that SIGTERM ends it when this process is gone."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # the child must not load libraries

    def ask() -> None:
        pr_set_pdeathsig = 1
        libc.prctl(pr_set_pdeathsig, int(signal.SIGTERM))
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return ask


def _patiently(job: subprocess.Popen[bytes]) -> int:
    """Wait for a job in short steps, since Python handles a signal that comes just before a long wait only after it."""
    while True:
        try:
            return job.wait(0.5)
        except subprocess.TimeoutExpired:
            pass


def _on_signal(jobs: list[subprocess.Popen[bytes]], received: list[int], number: int, _frame: object) -> None:
    received.append(number)
    if jobs:
        _forward(jobs[0], number)


def _forward(job: subprocess.Popen[bytes], number: int) -> None:
    if number != signal.SIGINT:
        job.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        return
    if not _in_foreground():  # else the terminal has sent it to mpiexec, which kills on a second one
        job.send_signal(number)
    # MPICH's mpiexec waits forever for ranks inside an MPI call; a second signal ends them.
    second = threading.Timer(_SECOND_INTERRUPT, job.send_signal, [number])
    second.daemon = True
    second.start()


def _in_foreground() -> bool:
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
