"""A finding: one line of the diagnosis, with a level and a remedy.

Every check returns findings; `show` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GOOD, WARNING, BAD = "good", "warning", "bad"
"""Levels of a finding."""
LEVELS = (GOOD, WARNING, BAD)
"""The levels, from the best to the worst."""


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    topic: str
    """The part of the machine or of the job."""
    level: str
    """``good``, ``warning`` (it runs, but slowly or not for long) or ``bad`` (it does not run, or is wrong)."""
    text: str
    """What was found."""
    remedy: str = ""
    """What to do about it."""


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst level among some findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default=GOOD)


def named(ranks: Iterable[int], size: int) -> str:
    """Return ranks of a job of this size in words: ``all 8 ranks``, ``rank 3`` or ``ranks 0-2, 5``."""
    ordered = sorted(ranks)
    if len(ordered) == size > 1:
        return f"all {size} ranks"
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
    return f"rank{'s' if len(ordered) > 1 else ''} {words}"
