"""How pictures look: colours that the colour-blind tell apart, lines that ink and paper of any page suit."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

INK = "#1b1f24"
"""Of text and axes; a page puts its own colour of text in its place."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b5659a", "#4a90c8", "#a07700")
"""Of runs. Okabe and Ito, Color universal design, 2008; the lighter ones darkened, to be seen on white and on black."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKS = ("o", "s", "^", "D", "v", "P")
KIND_COLORS = {
    "forward": "#0072b2",
    "backward": "#d55e00",
    "weight": "#a07700",
    "update": "#b5659a",
    "comm": "#009e73",
    "idle": "#9aa3ad",
}
WIDE, NARROW = (11.2, 4.0), (5.4, 3.1)
"""Inches: a picture across the page, and one of two side by side."""

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
}


def look(i: int) -> tuple[str, Any]:
    """Return the colour and the dashes of the i-th run: no two of the first 24 have both in common."""
    return COLORS[i % len(COLORS)], DASHES[(i // len(COLORS) + i) % len(DASHES)]


def styled() -> Any:
    """Return the context in which pictures are drawn and written."""
    import matplotlib

    return matplotlib.rc_context(_SETTINGS)


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure and its axes ``[rows, columns]``, without a window or a global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def thousands(axis: Any, ticks: int = 6) -> None:
    """Write the numbers of an axis in full, thousands separated; `ticks` of them at most."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend(axes: Any, handles: Sequence[Any]) -> None:
    """Put a legend over the picture, where it hides nothing."""
    if handles:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2}
        axes.legend(handles=handles, ncols=min(len(handles), 4), **place)


def png(figure: Any) -> bytes:
    """Return a figure as a PNG, on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white")
    figure.set_layout_engine("none")  # places stay as they were found, for the next time that it is drawn
    return file.getvalue()


def svg(figure: Any, name: str, about: str) -> str:
    """Return a figure as an SVG element without a background, its text and axes in the colour of the page's text.

    Parameters
    ----------
    figure : Figure
    name : str
        Put before all its ids, which are those of one page.
    about : str
        What a reader who cannot see it is told.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the page has it as wide as its column
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(about)}" ', 1)


def names(runs: Sequence[Any]) -> str:
    """Return the names of runs."""
    return ", ".join(run.name for run in runs)
