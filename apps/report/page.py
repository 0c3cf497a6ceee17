"""The HTML page of a report: one file that contains its pictures and needs neither scripts nor a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template

from colossal_mpi.apps.report import style, tables
from colossal_mpi.apps.report.runs import Run
from colossal_mpi.apps.report.style import Picture
from colossal_mpi.apps.report.tables import Table

_TEMPLATE = Path(__file__).with_name("page.html")


def page(runs: Sequence[Run], pictures: Sequence[Picture], lacking: Sequence[tuple[str, str]]) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    runs : sequence of Run
        The runs.
    pictures : sequence of Picture
        The pictures, in order.
    lacking : sequence of (str, str)
        The titles of the pictures that could not be made, each with the reason.
    """
    config = tables.configuration(runs)
    differing = tables.differences(config) if len(runs) > 1 else []
    parts = [
        _section("Results", _table(runs, tables.results(runs))),
        _section("Differences of the configurations", _table(runs, differing)) if differing else "",
        _section("Pictures", '<div class="pictures">' + "".join(map(_figure, pictures)) + "</div>"),
        _section("Not shown", _list(lacking)) if lacking else "",
        _folded("Configuration", _table(runs, config, marked={key for key, _ in differing})),
        _folded("Machine and versions", _table(runs, tables.machines(runs))),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"),
        subtitle=escape(f"{_about(runs)}Written by colossal-mpi {version('colossal-mpi')}."),
        body="\n".join(filter(None, parts)),
    )


def _about(runs: Sequence[Run]) -> str:
    about = list(dict.fromkeys(str(run.facts["about"]) for run in runs if run.facts.get("about")))
    return f"Data: {'; '.join(about)}. " if about else ""


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def _folded(title: str, inside: str) -> str:
    return f"<details open><summary>{escape(title)}</summary>{inside}</details>" if inside else ""


def _figure(picture: Picture) -> str:
    drawn = style.svg(picture.figure, picture.name, picture.title)
    wide = ' class="wide"' if picture.wide else ""
    note = f"<figcaption>{escape(picture.note)}</figcaption>" if picture.note else ""
    return f'<figure id="{picture.name}"{wide}><h3>{escape(picture.title)}</h3>{drawn}{note}</figure>'


def _list(items: Sequence[tuple[str, str]]) -> str:
    return '<ul class="soft">' + "".join(f"<li>{escape(f'{name}: {why}')}</li>" for name, why in items) + "</ul>"


def _table(runs: Sequence[Run], table: Table, marked: set[str] | None = None) -> str:
    if not table:
        return ""
    head = f"<thead><tr><th></th>{''.join(map(_head, range(len(runs)), runs))}</tr></thead>" if len(runs) > 1 else ""
    rows = "".join(_row(name, values, name in (marked or ())) for name, values in table)
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _head(i: int, run: Run) -> str:
    swatch = f'<span class="swatch" style="background:{style.look(i)[0]}"></span>'
    return f'<th scope="col">{swatch}{escape(run.name)}</th>'


def _row(name: str, values: Sequence[str], marked: bool) -> str:
    cells = "".join(f"<td>{escape(value) or '&ndash;'}</td>" for value in values)
    differs = ' class="differs"' if marked else ""
    return f'<tr{differs}><th scope="row">{escape(name)}</th>{cells}</tr>'
