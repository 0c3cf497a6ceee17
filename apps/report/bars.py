"""Pictures of the ranks: their memory, and the words and time of their communication."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from colossal_mpi.apps import text
from colossal_mpi.apps.report import style
from colossal_mpi.apps.report.runs import Run
from colossal_mpi.apps.report.style import NothingRecordedError, Picture, note_of_absent

_BARS = 24
"""A line replaces the bars from this number of bars on."""


def memory(runs: Sequence[Run]) -> Picture:
    """Draw the peak memory of each rank."""
    found = [(i, run, run.gathered[-1]["memory"]) for i, run in enumerate(runs) if run.gathered]
    if not found:
        raise NothingRecordedError("not recorded")
    scale, unit = text.bytes_unit(max(max(sizes) for *_, sizes in found))
    figure, panels = style.canvas(style.NARROW)
    axes, ranks = panels[0][0], max(len(sizes) for *_, sizes in found)
    for place, (i, run, sizes) in enumerate(found):
        heights = [size / scale for size in sizes]
        color, dashes = style.look(i)
        if ranks * len(found) > _BARS:
            axes.plot(heights, color=color, ls=dashes, drawstyle="steps-mid", label=style.literal(run.name))
            continue
        width = 0.8 / len(found)
        left = [rank + width * (place - (len(found) - 1) / 2) for rank in range(len(sizes))]
        bars = axes.bar(left, heights, 0.92 * width, color=color, label=style.literal(run.name))
        if ranks * len(found) <= _BARS // 2:
            axes.bar_label(bars, [text.significant(height) for height in heights], padding=2, fontsize=7.5)
    axes.grid(axis="y")
    axes.set(xlabel="rank", ylabel=f"peak resident memory ({unit})")
    axes.set_ylim(bottom=0)
    style.thousands(axes.xaxis)
    if len(runs) > 1:
        style.legend(axes, axes.get_legend_handles_labels()[0])
    note = note_of_absent(runs, [(i, run) for i, run, _ in found])
    return Picture("memory", "Memory of each rank", figure, note)


def words(runs: Sequence[Run]) -> Picture:
    """Draw the words of a step and the time of their communication, by the axes over which they moved."""
    found = [(i, run) for i, run in enumerate(runs) if run.words()]
    if not found:
        raise NothingRecordedError("no words by axis were recorded, or none were moved")
    labels = list(dict.fromkeys(axis for _, run in found for axis in run.words()))
    rows = [(label, i, run) for label in labels for i, run in found if label in run.words()]
    figure, panels = style.canvas((style.WIDE[0], 1.2 + 0.3 * len(rows) + 0.1 * len(labels)), 1, 2, sharey=True)
    places = [y + 0.4 * labels.index(label) for y, (label, *_) in enumerate(rows)]
    colors = [style.look(i)[0] for _, i, _ in rows]
    counts = [run.words()[label] for label, _, run in rows]
    times = [run.seconds().get(label, 0.0) for label, _, run in rows]
    _bars(panels[0][0], places, counts, [f"{count:,}" for count in counts], colors)
    _bars(panels[0][1], places, [1e3 * time for time in times], list(map(text.duration, times)), colors)
    panels[0][0].set(xlabel="words received in a step, all ranks together")
    panels[0][1].set(xlabel="time in communication, of a step and rank (ms)")
    middles = [fmean(y for y, (axis, *_) in zip(places, rows, strict=True) if axis == label) for label in labels]
    panels[0][0].set_yticks(middles, [style.literal(label) for label in labels])
    panels[0][0].invert_yaxis()
    if len(runs) > 1:
        from matplotlib.patches import Patch

        style.legend(panels[0][0], [Patch(color=style.look(i)[0], label=style.literal(run.name)) for i, run in found])
    note = note_of_absent(runs, found)
    note += (
        "A word is an array element. The time of a rank includes waits for other ranks, but not overlapped messages."
    )
    return Picture("words", "Communication by axis", figure, note, True)


def _bars(
    axes: Any, places: Sequence[float], lengths: Sequence[float], labels: Sequence[str], colors: Sequence[str]
) -> None:
    """Draw horizontal bars with a label each."""
    axes.bar_label(axes.barh(places, lengths, 0.85, color=colors), labels, padding=3, fontsize=8)
    axes.margins(x=0.16)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    style.thousands(axes.xaxis, 4)
