"""Stop a run after a signal: all ranks decide together, save a checkpoint, and end with the exit code `CODE`.

The training loop asks `Stop` in each step. Slurm sends SIGTERM when it needs the nodes of a job for another one, and,
with ``--signal=TERM@120``, before the time is up; the mpiexec of MPICH and of Intel MPI pass it on. Open MPI's kills
the ranks half a second after SIGTERM, but passes SIGUSR1 on: with ``COLOSSAL_MPI_STOP_SIGNAL=USR1`` that signal stops
a run, in place of printing what the ranks are doing.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, Self

import numpy as np
from mpi4py import MPI

from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.runtime import watchdog

WORD = "COLOSSAL_MPI_STOP_SIGNAL"
CODE = 85
"""The exit code of a run that was stopped and can be resumed: a job script starts it again."""
_NAMES = ("TERM", "USR1", "USR2", "HUP")


class Stop:
    """Within the ``with`` block, SIGTERM and SIGHUP (or what `WORD` names) ask all ranks to stop, and end none.

    If a rank does not answer, `colossal_mpi.runtime.watchdog` ends the job by force.

    Parameters
    ----------
    grid : Grid
        All ranks of the run.

    Attributes
    ----------
    asked : int
        The signal that this rank has received, 0 if none.

    Raises
    ------
    ConfigError
        If `WORD` names another signal.

    Examples
    --------
    >>> with Stop(grid) as stop:
    ...     for step in range(steps):
    ...         gradients(step)
    ...         stop.vote()
    ...         update(step)
    ...         if stop.decided():
    ...             break
    """

    def __init__(self, grid: Grid) -> None:
        self._comm = grid.comm(tuple(grid.axes))
        self._numbers = _numbers(os.environ.get(WORD) or "TERM,HUP")
        self._before: dict[int, Any] = {}
        self.asked = 0
        self._request: MPI.Request = MPI.REQUEST_NULL
        self._most = np.zeros(1, np.uint8)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._ask)
                signal.siginterrupt(number, False)  # so that the system calls of libraries do not fail
            watchdog.can_stop(True)
        return self

    def __exit__(self, *_: object) -> None:
        watchdog.can_stop(False)
        for number, action in self._before.items():
            signal.signal(number, signal.SIG_DFL if action is None else action)

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = number

    def vote(self) -> None:
        """Begin to ask all ranks.

        Notes
        -----
        **Communication:** a nonblocking allreduce of one byte over all ranks.
        """
        own, self._most = np.array([self.asked], np.uint8), np.zeros(1, np.uint8)
        self._request = self._comm.Iallreduce([own, MPI.UINT8_T], [self._most, MPI.UINT8_T], MPI.MAX)

    def decided(self) -> int:
        """Wait for the answer to `vote`.

        Returns
        -------
        int
            The signal that some rank has received, 0 if none has; the same on all ranks.
        """
        self._request.Wait()
        if self._most[0]:
            watchdog.stop_decided()
        return int(self._most[0])


def _numbers(words: str) -> list[int]:
    names = [word.strip().upper().removeprefix("SIG") for word in words.split(",")]
    alien = [name for name in names if name not in _NAMES]
    if alien:
        raise ConfigError(f"{WORD}={words!r}: use {', '.join(_NAMES)}, or some of them with commas between")
    return [int(signal.Signals[f"SIG{name}"]) for name in names]
