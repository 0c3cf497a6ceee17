"""Wait until every rank has finished a test, or say why that will not happen."""

import time
from dataclasses import dataclass, field

from .job import Job
from .merge import Part, grouped, named

GRACE = 3.0
STARTUP = 120.0
POLL = 0.02


@dataclass
class Interruption:
    """Why a test was given up: a headline, what to show below it, and whether a later test may be the cause."""

    message: str
    parts: list[Part] = field(default_factory=list)
    doubtful: bool = False


def follow(job: Job, test: str, deadline: float) -> Interruption | None:
    """Wait for a test.

    Parameters
    ----------
    job : Job
        What runs it.
    test : str
        Its node id; every test before it has been followed.
    deadline : float
        Seconds from the moment that the first rank started it and none was busy with an earlier one.

    Returns
    -------
    Interruption or None
        None when all ranks have finished it.
    """
    begun = time.monotonic()
    while True:
        status = job.process.poll()  # before the files: what was written before the end is then read
        job.read()
        if not (inside := job.inside(test)):
            return None
        if reason := _reason(job, test, inside, status) or _late(job, test, begun, deadline):
            died_ahead = status is not None and any(log.last not in (None, test) for log in job.ranks.values())
            return Interruption(*_account(job, test, inside, reason), doubtful=died_ahead)
        time.sleep(POLL)


def _reason(job: Job, test: str, inside: list[int], status: int | None) -> str | None:
    if status is not None:
        return f"the MPI job died (mpiexec ended with status {status})"
    for rank in inside:
        if (ended := job.ranks[rank].ended) is not None:
            return f"{named([rank], job.size)} left early ({ended})"
    failures = [log.failed[test] for log in job.ranks.values() if test in log.failed]
    if failures and time.monotonic() > min(failures) + GRACE:
        return f"{GRACE:g} s after the failure"
    return None


def _late(job: Job, test: str, begun: float, deadline: float) -> str | None:
    firsts = [min(log.started.values()) for log in job.ranks.values() if log.started]
    starts = [log.started[test] for log in job.ranks.values() if test in log.started]
    if len(firsts) < job.size or not starts:
        return f"not started within {STARTUP:g} s" if time.monotonic() > begun + STARTUP else None
    if time.monotonic() > max(begun, min(starts), *firsts) + deadline:
        return f"the deadline of {deadline:g} s passed"
    return None


def _account(job: Job, test: str, inside: list[int], reason: str) -> tuple[str, list[Part]]:
    message = f"{reason}: {named(inside, job.size)} had not finished the test"
    places = {rank: _place(job, rank, test) for rank in job.ranks}
    parts = [(message, "\n".join(f"{who}: {place}" for who, place in grouped(places, job.size)))]
    parts += [(f"{who} was at", stack) for who, stack in grouped(job.dump(inside), job.size)]
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
