"""The look of all pictures, and the class of a picture.

Colour-blind readers can tell the colours apart, and text and lines take the colour of the page's text. `curves`, `bars`
and `timeline` draw with these functions; matplotlib is loaded when the first picture is drawn.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from colossal_mpi.apps.report.runs import Run

INK = "#1b1f24"
"""Colour of text and axes; a page replaces it with its own colour of text."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5659a", "#4a90c8", "#a07700")
"""Colours of runs: Okabe and Ito, Color universal design, 2008, the lighter ones darkened for white and for black."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Dashes of runs."""
MARKS = ("o", "s", "^", "D", "v", "P")
"""Marks of runs."""
KIND_COLORS = {
    "forward": "#0072b2",
    "backward": "#d55e00",
    "weight": "#a07700",
    "update": "#b5659a",
    "comm": "#009e73",
    "idle": "#9aa3ad",
}
"""Colours of the kinds of events in a trace."""
WIDE, NARROW = (11.2, 4.0), (5.4, 3.1)
"""Width and height in inches: a picture across the page, and one of two side by side."""

_SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "path",
    "text.usetex": False,  # whatever a matplotlibrc of the working directory says
    "text.parse_math": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure of a report, with the texts above and below it."""

    name: str
    title: str
    figure: Any
    note: str = ""
    wide: bool = False


class NothingRecordedError(Exception):
    """A picture cannot be made of these runs; the report shows the reason instead."""


def runs_with(runs: Sequence[Run], key: str) -> list[tuple[int, Run]]:
    """Return the runs that recorded a number, with their indices, which choose their colours.

    Raises
    ------
    NothingRecordedError
        If no run recorded it.
    """
    found = [(i, run) for i, run in enumerate(runs) if run.series(key)[0]]
    if not found:
        raise NothingRecordedError("not recorded")
    return found


def note_of_absent(runs: Sequence[Run], found: Sequence[tuple[int, Run]], what: str = "Not recorded by") -> str:
    """Return a sentence about the runs that are not in a picture."""
    indices = {i for i, _ in found}
    absent = [run.name for i, run in enumerate(runs) if i not in indices]
    return f"{what} {', '.join(absent)}. " if absent else ""


def literal(text: str) -> str:
    """Return a text that matplotlib draws as it is, though it has dollar signs: names are no mathematics."""
    return text.replace("$", r"\$")


def look(i: int) -> tuple[str, Any]:
    """Return the colour and the dashes of the i-th run: no two of the first 24 runs have both in common."""
    return COLORS[i % len(COLORS)], DASHES[(i // len(COLORS) + i) % len(DASHES)]


def styled() -> AbstractContextManager[None]:
    """Return the context in which to draw and write pictures."""
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(_SETTINGS)
    return context


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure and its axes ``[rows, columns]``, without a window and without global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def thousands(axis: Any, ticks: int = 6) -> None:
    """Write the numbers of an axis in full, with thousands separated, at most `ticks` of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend(axes: Any, handles: Sequence[Any]) -> None:
    """Put a legend above the picture, where it hides nothing."""
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
        axes.legend(handles=handles, ncols=min(len(handles), 4), **place)


def png(figure: Any) -> bytes:
    """Return a figure as a PNG on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white")
    figure.set_layout_engine("none")  # keep the layout for the next time that it is drawn
    return file.getvalue()


def svg(figure: Any, name: str, about: str) -> str:
    """Return a figure as an SVG element without a background, with text and axes in the colour of the page's text.

    Parameters
    ----------
    figure : Figure
        The figure of matplotlib.
    name : str
        Prefix of all its ids, so that they are unique on a page.
    about : str
        The text for a reader who cannot see it.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # on the page it is as wide as its column
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(about)}" ', 1)
