"""Check that all ranks run the same program, and list the optional packages that it has.

The check finds another Python or another version of a file on one of many hosts.
"""

from __future__ import annotations

from collections.abc import Sequence

from colossal_mpi.apps.doctor.facts import Facts
from colossal_mpi.apps.doctor.finding import BAD, GOOD, Finding, named
from colossal_mpi.apps.environment import PACKAGES

_TOPIC = "program"
_REMEDY = "start every rank with the same interpreter, by its full path, in a folder that all hosts share"
_OPTIONAL = {
    "torch": "torch",
    "cupy": "cuda12 or cuda13",
    "safetensors": "hf",
    "scikit-learn": "digits",
    "tokenizers": "tokens",
    "tensorboardX": "tensorboard",
}
"""The extra of colossal-mpi that brings each optional package."""


def check(facts: Sequence[Facts]) -> list[Finding]:
    """Return one finding for each difference between the ranks, or one finding that they agree."""
    values = {
        "Python": [one["python"] for one in facts],
        "the MPI library": [one["library"] for one in facts],
        **{name: [one["versions"].get(name, "none") for one in facts] for name in PACKAGES},
        "the source of colossal_mpi": [one["source"] for one in facts],
    }
    different = [_difference(name, found, facts) for name, found in values.items() if len(set(found)) > 1]
    if different:
        return different
    first = facts[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in PACKAGES[:3] if name in first["versions"])
    where = "the same on " + named(range(len(facts)), len(facts)) if len(facts) > 1 else first["executable"]
    return [Finding(_TOPIC, GOOD, f"Python {first['python']}, {versions}; {where}")]


def _difference(name: str, values: Sequence[str], facts: Sequence[Facts]) -> Finding:
    """Return the finding that the ranks differ, with each value and the ranks and hosts that have it."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    words = []
    for value, ranks in groups.items():
        hosts = sorted({facts[rank]["host"] for rank in ranks})
        more = f" and {len(hosts) - 3} more" if len(hosts) > 3 else ""
        words.append(f"{value} on {named(ranks, len(facts))} ({', '.join(hosts[:3])}{more})")
    return Finding(_TOPIC, BAD, f"{name} differs: {'; '.join(words)}", _REMEDY)


def optional_packages(facts: Sequence[Facts]) -> Finding:
    """Return the finding about the optional packages that rank 0 has, and the extras that bring the others."""
    versions = facts[0]["versions"]
    present = [f"{name} {version}" for name, version in versions.items() if name.startswith(tuple(_OPTIONAL))]
    absent = [f"{name} [{extra}]" for name, extra in _OPTIONAL.items() if not any(v.startswith(name) for v in versions)]
    text = ", ".join(present) or "none"
    return Finding("options", GOOD, text + (f"; not installed (extra): {', '.join(absent)}" if absent else ""))
