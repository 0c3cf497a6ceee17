"""Make one report of the reports of many ranks.

`colossal_mpi.testing.runner` calls `merge` for each phase of a test. `colossal_mpi.testing.watch` makes the
`Interruption` that explains why ranks are missing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

Part = tuple[str, Any]
"""A heading and the part below it: text, or a longrepr of pytest."""
# The outcome of the test is the first of these outcomes that any rank has.
ORDER = ("failed", "xfailed", "interrupted", "xpassed strictly", "skipped", "passed")


@dataclass
class Interruption:
    """Why waiting for a test was ended: a headline, the parts below it, and whether a later test may be the cause."""

    message: str
    parts: list[Part] = field(default_factory=list)
    doubtful: bool = False


def rank_list(ranks: Iterable[int], size: int) -> str:
    """Return ``rank 2 of 4`` or ``ranks 0, 1 of 4``."""
    ranks = list(ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {size}"


def group_equal(bodies: Mapping[int, Any], size: int) -> list[Part]:
    """Return each different body once, headed by the ranks that have it; addresses in memory are ignored."""
    owners: dict[str, list[int]] = {}
    for rank, body in bodies.items():
        owners.setdefault(re.sub("0x[0-9a-f]+", "", str(body)), []).append(rank)
    return [(rank_list(ranks, size), bodies[ranks[0]]) for ranks in owners.values()]


@dataclass
class Crash:
    """The one line of the short summary, as pytest's own ``ReprFileLocation``."""

    path: str
    lineno: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.lineno}: {self.message}"


class RanksRepr:
    """Tracebacks and stacks, each under a heading, as a longrepr of pytest."""

    def __init__(self, parts: list[Part], crash: Crash):
        self.parts, self.reprcrash = parts, crash

    def toterminal(self, tw: Any) -> None:
        """Write the parts, in colour where they have any."""
        for heading, body in self.parts:
            tw.line(f"{heading}:", bold=True, red=True)
            if hasattr(body, "toterminal"):
                body.toterminal(tw)
            else:
                tw.line(str(body))

    def __str__(self) -> str:
        return "\n".join(f"{heading}:\n{body}" for heading, body in self.parts)


def merge(
    item: pytest.Item,
    when: str,
    reports: Mapping[int, pytest.TestReport],
    size: int,
    interruption: Interruption | None = None,
) -> pytest.TestReport:
    """Return the report of one phase of a test.

    Parameters
    ----------
    item : pytest.Item
        The test, as the parent has collected it.
    when : str
        The phase: ``setup``, ``call`` or ``teardown``.
    reports : mapping of int to TestReport
        The reports of the ranks that have finished the phase, by rank.
    size : int
        The number of ranks.
    interruption : Interruption, optional
        Why the missing ranks have not finished it.
    """
    kinds = {rank: _kind(report) for rank, report in reports.items()}
    shown = {*kinds.values(), *(["interrupted"] if interruption else [])}
    kind = next((kind for kind in ORDER if kind in shown), "passed")
    chosen = {rank: report for rank, report in reports.items() if kinds[rank] == kind}
    merged = pytest.TestReport(
        item.nodeid,
        item.location,
        dict.fromkeys(item.keywords, 1),
        outcome={"xfailed": "skipped", "skipped": "skipped", "passed": "passed"}.get(kind, "failed"),  # type: ignore[arg-type]
        longrepr=_longrepr(item, kind, chosen, size, interruption),
        when=when,  # type: ignore[arg-type]
        sections=_sections(reports, size),
        duration=max((report.duration for report in reports.values()), default=0.0),
        user_properties=next((report.user_properties for report in reports.values()), ()),
    )
    for report in chosen.values():
        if hasattr(report, "wasxfail"):
            merged.wasxfail = report.wasxfail
    return merged


def _kind(report: pytest.TestReport) -> str:
    if report.failed:
        return "xpassed strictly" if str(report.longrepr).startswith("[XPASS(strict)]") else "failed"
    return "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome


def _longrepr(
    item: pytest.Item,
    kind: str,
    chosen: Mapping[int, pytest.TestReport],
    size: int,
    interruption: Interruption | None,
) -> Any:
    if kind == "passed":
        return None
    if kind == "skipped":
        return tuple(next(iter(chosen.values())).longrepr)  # type: ignore[arg-type]
    parts = group_equal({rank: report.longrepr for rank, report in chosen.items()}, size)
    crash = Crash(str(item.path), (item.location[1] or 0) + 1, interruption.message if interruption else "")
    if parts:
        who, body = parts[0]
        own = getattr(body, "reprcrash", None) or Crash(crash.path, crash.lineno, str(body))
        crash = Crash(own.path, own.lineno, f"{who}: {own.message}")
    return RanksRepr(parts + (interruption.parts if interruption else []), crash)


def _sections(reports: Mapping[int, pytest.TestReport], size: int) -> list[tuple[str, str]]:
    names = dict.fromkeys(name for report in reports.values() for name, _ in report.sections)
    return [
        (f"{name}, {who}", text)
        for name in names
        for who, text in group_equal(
            {rank: dict(report.sections)[name] for rank, report in reports.items() if name in dict(report.sections)},
            size,
        )
    ]
