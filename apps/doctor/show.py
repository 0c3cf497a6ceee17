"""Print a diagnosis: a table at a terminal, lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colossal_mpi.apps.doctor.finding import BAD, GOOD, WARNING, Finding, worst
from colossal_mpi.apps.doctor.network import NamedLink

_STYLES = {GOOD: "green", WARNING: "yellow", BAD: "bold red"}


def as_json(ranks: int, findings: Sequence[Finding], links: Sequence[NamedLink]) -> str:
    """Return the diagnosis as JSON; latencies in seconds, bandwidths in bytes/s."""
    parts = {"findings": [asdict(one) for one in findings], "network": [asdict(link) for link in links]}
    return json.dumps({"level": worst(findings), "ranks": ranks, **parts}, indent=1)


def show(findings: Sequence[Finding], links: Sequence[NamedLink]) -> None:
    """Print the diagnosis, as a table at a terminal and as lines elsewhere."""
    console = Console(markup=False, soft_wrap=True, highlight=False)
    if console.is_terminal:
        console.print(table(findings))
        if links:
            console.print(measured(links))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines(findings, links)))
    console.print(summary(findings))


def table(findings: Sequence[Finding]) -> Table:
    """Return the findings as a table."""
    made = Table(box=box.SIMPLE_HEAD, show_header=False, padding=(0, 1, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True, style="bold")
    made.add_column(overflow="fold")
    for one in findings:
        made.add_row(Text(one.level, _STYLES[one.level]), one.topic, Text(one.text))
        if one.remedy:
            made.add_row("", "", Text(f"-> {one.remedy}", _STYLES[one.level]))
    return made


def measured(links: Sequence[NamedLink]) -> Table:
    """Return the measured links as a table."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("ranks", "within", "latency", "bandwidth"):
        made.add_column(name, justify="right" if name in ("latency", "bandwidth") else "left")
    for row in map(_figures, links):
        made.add_row(*row)
    return made


def _figures(link: NamedLink) -> tuple[str, str, str, str]:
    where = "a node" if link.near else "the network"
    return link.name, where, f"{link.latency * 1e6:,.1f} us", f"{link.bandwidth / 1e9:,.2f} GB/s"


def lines(findings: Sequence[Finding], links: Sequence[NamedLink]) -> list[str]:
    """Return the diagnosis as plain lines, one for each finding, each remedy and each link."""
    found = []
    for one in findings:
        found.append(f"{one.level:<8} {one.topic:<9} {one.text}")
        found += [f"{'':<18} -> {one.remedy}"] if one.remedy else []
    return found + ["measured " + "  ".join(_figures(link)) for link in links]


def summary(findings: Sequence[Finding]) -> Text:
    """Return the number of findings of each level."""
    counts = Counter(one.level for one in findings)
    words = [f"{counts[level]} {level}" for level in (BAD, WARNING, GOOD) if counts[level]]
    return Text(", ".join(words), _STYLES[worst(findings)])
