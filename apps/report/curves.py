"""Pictures of the quantities that change from step to step, with one line for each run, all on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from colossal_mpi.apps.report import style
from colossal_mpi.apps.report.runs import Run, shares
from colossal_mpi.apps.report.style import NothingRecordedError, Picture, note_of_absent, runs_with

_SMOOTHED = 60
"""From this number of steps on a line is the running median, over the faint values themselves."""
_DECADES = 30
"""From this ratio of the greatest to the least value on an axis is logarithmic."""


def loss(runs: Sequence[Run]) -> Picture:
    """Draw the training losses as lines, and the validation losses as marks."""
    figure, axes = _axes(runs, wide=True)
    found = runs_with(runs, "loss")
    for i, run in found:
        color, dashes = style.look(i)
        _line(axes, *run.series("loss"), color, dashes)
        steps, values = run.series("val_loss")
        axes.plot(steps, values, style.MARKS[i % len(style.MARKS)], color=color, ms=5, zorder=4)
    if len(runs) == 1 and runs[0].last("val_loss") is not None:
        steps, values = runs[0].series("val_loss")
        _annotate(axes, steps[-1], values[-1], f"{values[-1]:.3f}")
    units = {run.per for run in runs}
    axes.set(ylabel=f"loss (nats per {style.literal(units.pop())})" if len(units) == 1 else "loss (nats)")
    _legend(axes, runs, [_mark("training", "-"), _mark("validation", "o")])
    return Picture(
        "loss", "Loss", figure, "Line: training, as a running median where it is long. Marks: validation.", True
    )


def _mark(label: str, form: str) -> Any:
    """Return a line of a legend: dots if the form is ``o``, else a line with these dashes."""
    from matplotlib.lines import Line2D

    shape: dict[str, Any] = {"marker": "o", "ls": ""} if form == "o" else {"ls": form}
    return Line2D([], [], color=style.look(0)[0], label=label, **shape)


def measures(runs: Sequence[Run]) -> Picture:
    """Draw the measures of the validations that are shares of the held-out samples, such as the accuracy."""
    names = list(dict.fromkeys(name for run in runs for row in run.rows for name in shares(row)))
    if not names:
        raise NothingRecordedError("no measure besides the loss was recorded")
    figure, panels = style.canvas(style.NARROW, 1, len(names), sharey=True)
    for axes, name in zip(panels[0], names, strict=True):
        key = f"val_{name.replace(' ', '_')}"
        for i, run in runs_with(runs, key):
            steps, values = run.series(key)
            color, dashes = style.look(i)
            mark = style.MARKS[i % len(style.MARKS)]
            axes.plot(steps, [100 * value for value in values], marker=mark, ms=4, color=color, ls=dashes)
            if len(runs) == 1:
                _annotate(axes, steps[-1], 100 * values[-1], f"{100 * values[-1]:.1f} %")
        _steps(axes)
        axes.set_title(style.literal(name), loc="right")
    panels[0][0].set(ylabel="of the held-out (%)")
    _legend(panels[0][0], runs)
    return Picture("measures", "Validation measures", figure)


def speed(runs: Sequence[Run]) -> Picture:
    """Draw the tokens or samples per second."""
    units = list(dict.fromkeys(run.unit for run in runs))
    if len(units) > 1:
        raise NothingRecordedError(f"the runs count different things, {', '.join(units)}")
    key = f"{units[0]}_per_second"
    figure, axes = _axes(runs)
    found = runs_with(runs, key)
    for i, run in found:
        _line(axes, *run.series(key), *style.look(i))
    axes.set(ylabel=f"{style.literal(units[0])} / s")
    axes.set_ylim(bottom=0)
    style.thousands(axes.yaxis)
    return Picture("speed", "Speed", figure, note_of_absent(runs, found))


def utilisation(runs: Sequence[Run]) -> Picture:
    """Draw the utilisation of the peak by model flop (MFU) and by hardware flop (HFU)."""
    figure, axes = _axes(runs)
    found = runs_with(runs, "mfu")
    for i, run in found:
        color = style.look(i)[0]
        for key, dashes in (("mfu", "-"), ("hfu", (0, (2, 1.5)))):
            steps, values = run.series(key)
            _line(axes, steps, [100 * value for value in values], color, dashes)
    axes.set(ylabel="of the peak (%)")
    axes.set_ylim(bottom=0)
    marks = [_mark("MFU", "-"), _mark("HFU", ":")]
    _legend(axes, [run for _, run in found] if len(runs) > 1 else runs, marks)
    note = (
        "MFU counts the flop of the model by its formula (PaLM: 6 N + 12 L s a d for a token). HFU, dotted, counts the "
        "flop that are computed: without masked tiles of scores, with what the backward pass recomputes. "
    )
    return Picture("utilisation", "Utilisation", figure, note_of_absent(runs, found) + note)


def rate(runs: Sequence[Run]) -> Picture:
    """Draw the learning rates."""
    figure, axes = _axes(runs)
    found = runs_with(runs, "learning_rate")
    for i, run in found:
        color, dashes = style.look(i)
        axes.plot(*run.series("learning_rate"), color=color, ls=dashes, lw=1.6)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(ylabel="learning rate")
    axes.set_ylim(bottom=0)
    return Picture("rate", "Learning rate", figure, note_of_absent(runs, found))


def gradient(runs: Sequence[Run]) -> Picture:
    """Draw the norms of the gradients before clipping, and the norms above which they are clipped."""
    figure, axes = _axes(runs)
    found = runs_with(runs, "gradient_norm")
    values = [value for _, run in found for value in run.series("gradient_norm")[1]]
    for i, run in found:
        _line(axes, *run.series("gradient_norm"), *style.look(i))
    clips = sorted({run.config["training.clip"] for run in runs if "training.clip" in run.config})
    shown = [clip for clip in clips if min(values) <= clip <= max(values)]
    for clip in shown:
        axes.axhline(clip, color=style.INK, lw=0.8, ls=(0, (3, 3)), alpha=0.6)
    if min(values) > 0 and max(values) > _DECADES * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(ylabel="norm of the gradient")
    note = f"Dashed: clipped from {', '.join(f'{clip:g}' for clip in shown)} on. " if shown else ""
    return Picture("gradient", "Gradient norm", figure, note_of_absent(runs, found) + note)


def scale(runs: Sequence[Run]) -> Picture:
    """Draw the loss scales of training in 16-bit floats."""
    figure, axes = _axes(runs)
    found = runs_with(runs, "loss_scale")
    for i, run in found:
        color, dashes = style.look(i)
        axes.plot(*run.series("loss_scale"), color=color, ls=dashes, lw=1.6, drawstyle="steps-post")
    axes.set_yscale("log", base=2)
    axes.set(ylabel="loss scale")
    return Picture("scale", "Loss scale", figure, note_of_absent(runs, found))


def _axes(runs: Sequence[Run], wide: bool = False) -> tuple[Any, Any]:
    """Return a figure and its axes over the steps, with the names of several runs above it."""
    figure, panels = style.canvas(style.WIDE if wide else style.NARROW)
    axes = panels[0][0]
    _steps(axes)
    _legend(axes, runs)
    return figure, axes


def _steps(axes: Any) -> None:
    axes.grid()
    axes.set(xlabel="step")
    style.thousands(axes.xaxis)


def _legend(axes: Any, runs: Sequence[Run], others: Sequence[Any] = ()) -> None:
    """Name the lines: the runs if there are several, else the lines of the one run."""
    from matplotlib.lines import Line2D

    if len(runs) == 1:
        style.legend(axes, others)
        return
    looks = [style.look(i) for i in range(len(runs))]
    style.legend(
        axes,
        [
            Line2D([], [], color=c, ls=d, lw=1.6, label=style.literal(run.name))
            for (c, d), run in zip(looks, runs, strict=True)
        ],
    )


def _line(axes: Any, steps: Sequence[int], values: Sequence[float], color: str, dashes: Any) -> None:
    if len(steps) < _SMOOTHED:
        axes.plot(steps, values, color=color, ls=dashes, lw=1.5, marker="." if len(steps) == 1 else None)
        return
    axes.plot(steps, values, color=color, lw=0.7, alpha=0.4)
    axes.plot(steps, running_median(values, max(5, len(values) // 40)), color=color, ls=dashes, lw=1.6)


def running_median(values: Sequence[float], width: int) -> list[float]:
    """Return the median of `width` values around each value, of fewer values at the ends."""
    half = width // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _annotate(axes: Any, x: float, y: float, text: str) -> None:
    """Write a text above a point."""
    axes.annotate(text, (x, y), (0, 8), textcoords="offset points", ha="right", color=style.INK, weight="bold")
