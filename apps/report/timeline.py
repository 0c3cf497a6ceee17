"""The picture of a traced step: when each rank computes, communicates and waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colossal_mpi.apps.report import style
from colossal_mpi.apps.report.runs import Run
from colossal_mpi.apps.report.style import NothingRecordedError, Picture, note_of_absent

_RANKS = 32
"""Greatest number of ranks that are drawn."""
_LABELLED = 0.02
"""A bar of at least this share of the picture's width shows the number of its microbatch."""
_LOWER, _FAINT = ("comm", "idle"), {"idle": 0.45}
_NUMBER: Any = {"ha": "center", "va": "center", "color": "white", "fontsize": 7.5, "zorder": 5}

Events = Sequence[dict[str, Any]]


def timeline(runs: Sequence[Run]) -> Picture:
    """Draw the last traced step of each run, on one scale of time."""
    found = [(run, step_of(run.trace)) for run in runs if any(event.get("cat") == "step" for event in run.trace)]
    if not found:
        raise NothingRecordedError("no step was traced: run.trace_steps or --trace")
    lanes = [min(_RANKS, 1 + max(event["pid"] for event in events)) for _, (_, events) in found]
    height = sum(0.75 + 0.34 * count for count in lanes) + 0.5
    figure, panels = style.canvas(
        (style.WIDE[0], height), len(found), 1, sharex=True, height_ratios=[1 + count for count in lanes]
    )
    whole = max(_span(events)[1] - _span(events)[0] for _, (_, events) in found) / 1e3
    for axes, (run, (number, events)), count in zip(panels[:, 0], found, lanes, strict=True):
        _lanes(axes, events, count, whole)
        places = {event["pid"]: event["args"]["name"] for event in run.trace if event["name"] == "process_name"}
        axes.set_yticks(range(count), [style.literal(str(places.get(rank, f"rank {rank}"))) for rank in range(count)])
        axes.set_title(f"{style.literal(run.name)}, step {number}" if len(runs) > 1 else f"step {number}", loc="left")
    panels[-1, 0].set(xlabel="ms", xlim=(0, whole))
    _legend(figure, {event.get("cat") for _, (_, events) in found for event in events})
    note = (
        "Upper half: what a rank computes, with the number of the microbatch. Lower half: communication it waits for. "
    )
    traced = [run for run, _ in found]
    note += note_of_absent(runs, [(i, run) for i, run in enumerate(runs) if run in traced], "No traced step of")
    return Picture("timeline", "Timeline", figure, note + "trace.json has all of it, for ui.perfetto.dev.", True)


def step_of(events: Events) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of the last traced step, and its events."""
    steps = [event for event in events if event.get("cat") == "step"]
    number = max(event["args"]["step"] for event in steps)
    spans = {event["pid"]: event for event in steps if event["args"]["step"] == number}
    inside = [
        event
        for event in events
        if event.get("ph") == "X" and event["pid"] in spans and _within(event, spans[event["pid"]])
    ]
    return number, inside


def _within(event: dict[str, Any], span: dict[str, Any]) -> bool:
    slack = 1e-3
    return bool(
        span["ts"] - slack <= event["ts"] and event["ts"] + event["dur"] <= span["ts"] + span["dur"] + 2 * slack
    )


def _span(events: Events) -> tuple[float, float]:
    """Return the begin and the end of a step over all ranks, in microseconds."""
    steps = [event for event in events if event["cat"] == "step"]
    return min(event["ts"] for event in steps), max(event["ts"] + event["dur"] for event in steps)


def _lanes(axes: Any, events: Events, count: int, whole: float) -> None:
    begun, _ = _span(events)
    drawn: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for event in events:
        kind, rank, args = event["cat"], event["pid"], event["args"]
        if kind == "step" or rank >= count or "layer" in args:
            continue
        start, width = (event["ts"] - begun) / 1e3, event["dur"] / 1e3
        drawn.setdefault((kind, rank), []).append((start, width))
        if "microbatch" in args and width > _LABELLED * whole:
            axes.text(start + width / 2, rank - 0.18, str(args["microbatch"]), **_NUMBER)
    for (kind, rank), bars in drawn.items():
        band = (rank + 0.08, 0.36) if kind in _LOWER else (rank - 0.42, 0.48)
        axes.broken_barh(bars, band, color=style.KIND_COLORS[kind], alpha=_FAINT.get(kind, 1.0), lw=0)
    axes.set(ylim=(count - 0.4, -0.6))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _legend(figure: Any, kinds: set[Any]) -> None:
    from matplotlib.patches import Patch

    names = {"comm": "communication", "idle": "wait", "weight": "weight gradient", "update": "update"}
    patches = [
        Patch(color=color, alpha=_FAINT.get(kind, 1.0), lw=0, label=names.get(kind, kind))
        for kind, color in style.KIND_COLORS.items()
        if kind in kinds
    ]
    figure.legend(handles=patches, loc="outside upper left", ncols=len(patches))
