"""The wait for all ranks to finish a test, which ends early when one of them cannot.

`colossal_mpi.testing.runner` calls `follow`, which reads the files of a `colossal_mpi.testing.job.Job`.
"""

import time

from .job import Job
from .merge import Interruption, Part, group_equal, rank_list

GRACE = 3.0  # seconds that the other ranks have after the first one failed
STARTUP = 120.0  # seconds until all ranks have begun
POLL = 0.02  # seconds


def follow(job: Job, test: str, deadline: float) -> Interruption | None:
    """Wait for a test.

    Parameters
    ----------
    job : Job
        The job that runs the test.
    test : str
        The node id of the test; every test of the job before it has been followed.
    deadline : float
        Seconds that the test may take. They count from the moment when the first rank has started it and no rank is
        busy with an earlier test.

    Returns
    -------
    Interruption or None
        None when all ranks have finished the test.
    """
    begun = time.monotonic()
    while True:
        status = job.process.poll()  # before the files are read, so that they are complete if the job has ended
        job.read()
        if not (inside := job.inside(test)):
            return None
        if reason := _failure(job, test, inside, status) or _lateness(job, test, begun, deadline):
            died_ahead = status is not None and any(log.last not in (None, test) for log in job.ranks.values())
            return Interruption(*_describe(job, test, inside, reason), doubtful=died_ahead)
        time.sleep(POLL)


def _failure(job: Job, test: str, inside: list[int], status: int | None) -> str | None:
    if status is not None:
        return f"the MPI job died (mpiexec ended with status {status})"
    for rank in inside:
        if (ended := job.ranks[rank].ended) is not None:
            return f"{rank_list([rank], job.size)} left early ({ended})"
    failures = [log.failed[test] for log in job.ranks.values() if test in log.failed]
    if failures and time.monotonic() > min(failures) + GRACE:
        return f"{GRACE:g} s after the failure"
    return None


def _lateness(job: Job, test: str, begun: float, deadline: float) -> str | None:
    firsts = [min(log.started.values()) for log in job.ranks.values() if log.started]
    starts = [log.started[test] for log in job.ranks.values() if test in log.started]
    if len(firsts) < job.size or not starts:
        return f"not started within {STARTUP:g} s" if time.monotonic() > begun + STARTUP else None
    if time.monotonic() > max(begun, min(starts), *firsts) + deadline:
        return f"the deadline of {deadline:g} s passed"
    return None


def _describe(job: Job, test: str, inside: list[int], reason: str) -> tuple[str, list[Part]]:
    message = f"{reason}: {rank_list(inside, job.size)} had not finished the test"
    places = {rank: _place(job, rank, test) for rank in job.ranks}
    parts = [(message, "\n".join(f"{who}: {place}" for who, place in group_equal(places, job.size)))]
    parts += [(f"{who} was at", stack) for who, stack in group_equal(job.dump(inside), job.size)]
    if (output := job.output()).strip():
        parts.append(("output of the job", output))
    return message, parts


def _place(job: Job, rank: int, test: str) -> str:
    log = job.ranks[rank]
    if rank not in job.inside(test):
        return "past the test"
    if test not in log.started:
        return "not yet in the test"
    done = log.reports.get(test, {})
    return "in its " + next(when for when in ("setup", "call", "teardown") if when not in done)
