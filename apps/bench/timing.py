"""Time a piece of work that several ranks do together, while the other ranks keep out of the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import threadpoolctl
from mpi4py import MPI

from colossal_mpi.errors import ColossalError
from colossal_mpi.runtime import launcher

_NAP = 5e-4  # seconds between two looks
_SPIN = 0.5  # seconds after which threads that still run are not waiting for the next product: MPI has some too
_PATIENCE = 60.0  # seconds that a rank which has failed waits for the others, which may wait for it in the product


def quiet_barrier(patience: float | None = None) -> None:
    """Wait for all ranks asleep: a rank that waits inside MPI takes a core from those that work.

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


def timed(work: Callable[[], Any], group: MPI.Intracomm | None) -> float:
    """Return the seconds that `work` takes on the slowest rank of `group`. Collective over all ranks.

    Parameters
    ----------
    work : callable
        What the ranks of the group do.
    group : MPI.Intracomm or None
        None on the ranks that take no part; they sleep.

    Raises
    ------
    ColossalError
        On all ranks, if `work` raised one or ran out of memory on some.
    """
    quiet_barrier()
    taken, failure = 0.0, None
    if group is not None:
        group.Barrier()
        begun = time.perf_counter()
        try:
            work()
        except (ColossalError, MemoryError) as problem:
            failure = words_of(problem)
        taken = time.perf_counter() - begun
    quiet_barrier(_PATIENCE if failure else None)
    outcomes = MPI.COMM_WORLD.allgather((taken, failure))
    together([failure for _, failure in outcomes])
    return max(taken for taken, _ in outcomes)


def agreed(action: Callable[[], Any]) -> None:
    """Do something on every rank that communicates nothing, and fail on all ranks if it does on one.

    Raises
    ------
    ColossalError
    """
    try:
        action()
        failure = None
    except (ColossalError, MemoryError, OSError) as problem:
        failure = words_of(problem)
    together(MPI.COMM_WORLD.allgather(failure))


def together(failures: list[str | None]) -> None:
    """Raise the first of the failures of all ranks, if there is one."""
    first = next((failure for failure in failures if failure is not None), None)
    if first is not None:
        raise ColossalError(first)


def words_of(problem: BaseException) -> str:
    """Return the text of an error."""
    return f"out of memory: {problem}".removesuffix(": ") if isinstance(problem, MemoryError) else str(problem)


def cores(node: MPI.Comm) -> set[int]:
    """Return the cores that the ranks of a node may use together."""
    return set().union(*node.allgather(launcher.cpus()))


@contextmanager
def blas_threads(count: int, on: set[int]) -> Iterator[None]:
    """Let BLAS use that many threads on these cores; afterwards one thread again, where it was bound before."""
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if bound:
        os.sched_setaffinity(0, on)  # the threads to be started inherit it
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
