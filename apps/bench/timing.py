"""Time work that some ranks do together while the other ranks sleep, and agree on failures.

The competitors of the harness call `timed` for each turn and `agreed` for what a rank prepares alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import threadpoolctl
from mpi4py import MPI

from colossal_mpi.errors import ColossalError

_NAP = 5e-4  # seconds between two tests of a request
_SPIN = 0.5  # seconds; threads that are busy for longer belong to MPI, not to BLAS
_PATIENCE = 60.0  # seconds that a failed rank waits for the others, which may wait for it inside a product


def quiet_barrier(patience: float | None = None) -> None:
    """Wait for all ranks, asleep: a rank that waits inside MPI takes a core from the ranks that work.

    Parameters
    ----------
    patience : float, optional
        Seconds to wait at most.

    Raises
    ------
    MemoryError
        If the others do not come within `patience` seconds.
    """
    request, begun = MPI.COMM_WORLD.Ibarrier(), time.monotonic()
    while not request.Test():
        if patience is not None and time.monotonic() - begun > patience:
            raise MemoryError("this rank ran out of memory inside a product, and the others wait for it")
        time.sleep(_NAP)


def timed(work: Callable[[], object], group: MPI.Intracomm | None) -> float:
    """Return the seconds that the slowest rank of a group takes for `work`. Collective over all ranks.

    Parameters
    ----------
    work : callable
        What each rank of the group does.
    group : MPI.Intracomm or None
        The ranks that work; None on the other ranks, which sleep.

    Returns
    -------
    float
        Seconds, the same on all ranks.

    Raises
    ------
    ColossalError
        On all ranks, if `work` raised one or ran out of memory on some rank.
    """
    quiet_barrier()
    seconds, failure = 0.0, None
    if group is not None:
        group.Barrier()
        begun = time.perf_counter()
        try:
            work()
        except (ColossalError, MemoryError) as problem:
            failure = _message(problem)
        seconds = time.perf_counter() - begun
    quiet_barrier(_PATIENCE if failure else None)
    outcomes: list[tuple[float, str | None]] = MPI.COMM_WORLD.allgather((seconds, failure))
    _raise_first([failure for _, failure in outcomes])
    return max(seconds for seconds, _ in outcomes)


def agreed(action: Callable[[], object]) -> None:
    """Do something that communicates nothing on every rank, and fail on all ranks if it fails on one.

    Parameters
    ----------
    action : callable
        What each rank does.

    Raises
    ------
    ColossalError
        On all ranks, if `action` raised one, ran out of memory or met an error of the system on some rank.
    """
    try:
        action()
        failure = None
    except (ColossalError, MemoryError, OSError) as problem:
        failure = _message(problem)
    _raise_first(MPI.COMM_WORLD.allgather(failure))


def _raise_first(failures: Sequence[str | None]) -> None:
    first = next((failure for failure in failures if failure is not None), None)
    if first is not None:
        raise ColossalError(first)


def _message(problem: BaseException) -> str:
    return f"out of memory: {problem}".removesuffix(": ") if isinstance(problem, MemoryError) else str(problem)


@contextmanager
def blas_threads(count: int, cores: set[int]) -> Iterator[None]:
    """Let BLAS use `count` threads on these cores; afterwards one thread on the cores that it had."""
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if bound:
        os.sched_setaffinity(0, cores)  # the threads that BLAS starts inherit it
    try:
        with threadpoolctl.threadpool_limits(count, user_api="blas"):
            yield
    finally:
        if bound:
            os.sched_setaffinity(0, bound)


def cool_down() -> None:
    """Wait until the threads of BLAS sleep: OpenBLAS lets them spin for a tenth of a second after a product."""
    deadline = time.monotonic() + _SPIN
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.002:
            return
