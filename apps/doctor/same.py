"""Whether all ranks are the same program: another Python or another file on one of many hosts is found here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colossal_mpi.apps.doctor.facts import Facts
from colossal_mpi.apps.doctor.finding import BAD, GOOD, Finding, named
from colossal_mpi.apps.environment import PACKAGES

_TOPIC = "program"
_REMEDY = "start every rank with the same interpreter, by its full path, in a folder that all hosts share"


def check(facts: Sequence[Facts]) -> list[Finding]:
    """Return one finding for each difference between the ranks, or that there is none."""
    values: dict[str, list[Any]] = {
        "Python": [one["python"] for one in facts],
        "the MPI library": [one["library"] for one in facts],
        **{name: [one["versions"].get(name, "none") for one in facts] for name in PACKAGES},
        "the source of colossal_mpi": [one["source"] for one in facts],
    }
    different = [_told(name, told, facts) for name, told in values.items() if len(set(told)) > 1]
    if different:
        return different
    first = facts[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in PACKAGES[:3] if name in first["versions"])
    where = "the same on " + named(range(len(facts)), len(facts)) if len(facts) > 1 else first["executable"]
    return [Finding(_TOPIC, GOOD, f"Python {first['python']}, {versions}; {where}")]


def _told(name: str, told: Sequence[Any], facts: Sequence[Facts]) -> Finding:
    groups: dict[Any, list[int]] = {}
    for rank, value in enumerate(told):
        groups.setdefault(value, []).append(rank)
    words = []
    for value, ranks in groups.items():
        hosts = sorted({facts[rank]["host"] for rank in ranks})
        more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
        words.append(f"{value} on {named(ranks, len(facts))} ({', '.join(hosts[:3])}{more})")
    return Finding(_TOPIC, BAD, f"{name} differs: {'; '.join(words)}", _REMEDY)
