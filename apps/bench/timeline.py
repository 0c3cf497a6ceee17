"""What the stages of a pipeline compute when: its bubble, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps.bench.report import warn_of_noise

KINDS = ("forward", "backward", "weight")
_COLORS = {"forward": "#7fa7d0", "backward": "#2e8b57", "weight": "#e0a030"}


@dataclass(frozen=True)
class Bar:
    """A computation of a stage; times in seconds."""

    stage: int
    kind: str
    chunk: int
    start: float
    stop: float


@dataclass(frozen=True)
class Chart:
    """A panel of the picture."""

    title: str
    bars: Sequence[Bar]


def makespan(bars: Sequence[Bar]) -> float:
    """Return the seconds from the first start to the last stop."""
    return max(bar.stop for bar in bars) - min(bar.start for bar in bars)


def bubble(bars: Sequence[Bar]) -> float:
    """Return the share of the stages' time in which they compute nothing."""
    stages = len({bar.stage for bar in bars})
    return 1 - sum(bar.stop - bar.start for bar in bars) / (stages * makespan(bars))


def show(title: str, rows: Sequence[dict[str, Any]], more: int) -> None:
    """Print the table of all schedules."""
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, 120)
    console.print(f"\n{title}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("bubble", "median", "simulated", f"of {more} stages", "best s", "median s", *(f"{k} ms" for k in KINDS))
    table.add_column("schedule", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shares = ("bubble", "median_bubble", "simulated_bubble", "simulated_bubble_of_more")
        figures = [f"{100 * row[key]:.1f} %" for key in shares]
        figures += [f"{row[key]:.4f}" for key in ("seconds", "median_seconds")]
        table.add_row(row["schedule"], *figures, *(f"{1e3 * row[f'{kind}_seconds']:.2f}" for kind in KINDS))
    console.print(table)
    console.print("bubble: the share of the ranks' time, from the first computation to the last, in which they wait;")
    console.print("simulated: with the measured times, and messages that take none")
    warn_of_noise(console, rows)


def plot(charts: Sequence[Chart], path: Path) -> None:
    """Draw the computations of all stages over time, two panels in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    down = -(-len(charts) // 2)
    figure, panels = pyplot.subplots(
        down, 2, figsize=(12, 1 + 1.8 * down), dpi=130, squeeze=False, layout="constrained"
    )
    for axes, chart in zip(panels.flat, charts, strict=False):
        start = min(bar.start for bar in chart.bars)
        for bar in chart.bars:
            left, width = 1e3 * (bar.start - start), 1e3 * (bar.stop - bar.start)
            shade = 1.0 if bar.chunk == 0 else 0.6
            axes.barh(bar.stage, width, 0.85, left, color=_COLORS[bar.kind], alpha=shade, ec="white", lw=0.4)
        stages = max(bar.stage for bar in chart.bars) + 1
        axes.set(yticks=range(stages), xlim=(0, 1e3 * makespan(chart.bars)))
        axes.set_title(f"{chart.title}: bubble {100 * bubble(chart.bars):.1f} %", size=9)
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("ms", size=8)
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in _COLORS.items()],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path)
    pyplot.close(figure)
