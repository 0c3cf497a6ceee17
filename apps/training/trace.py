"""Traces of steps: the computations, messages and waits of every rank, on one clock.

``trace.json`` has the trace event format of Chrome and opens in Perfetto (https://ui.perfetto.dev). Each rank is a
process. Its track "step" shows what the rank itself did, nested: steps, passes of microbatches, layers, communication
and waits. Communication that went on meanwhile is on further tracks. The meter makes the traces, from the records of
``ledger``.

References
----------
Google: Trace event format, 2016.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from colossal_mpi import ledger
from colossal_mpi.apps.files import write_output
from colossal_mpi.grid import Grid

KINDS = ("forward", "backward", "weight", "update", "comm", "idle")
"""Categories of the slices of a track; a step has none of them."""
_STEP, _FLYING = 0, 1
_GAP = 20e-6
"""Seconds; a gap in a step that is shorter than this is no wait."""

Slice = tuple[str, str, float, float, dict[str, Any]]
"""Name, category, begin and end in seconds, and details."""


class Trace:
    """The traced steps of a run, gathered on rank 0, which writes them.

    Parameters
    ----------
    grid : Grid
        All ranks of the run.
    path : Path
        The file to write.
    steps : collection of int
        Numbers of the steps to trace, from 1.
    """

    def __init__(self, grid: Grid, path: Path, steps: Collection[int] = ()) -> None:
        self.grid, self.path, self.steps = grid, path, frozenset(steps)
        self._events: list[dict[str, Any]] = []
        self._begun: float | None = None
        self._offsets: dict[str, float] = {}  # one for the clock of each host

    def add(self, step: int, record: ledger.Record, begun: float, ended: float) -> None:
        """Add a step to the trace, if it is one of the steps to trace.

        Parameters
        ----------
        step : int
            Number of the step, from 1.
        record : Record
            The communication and the spans of the step on this rank.
        begun, ended : float
            When the step began and ended, in seconds of ``time.perf_counter``.

        Notes
        -----
        **Communication:** a gather of the ranks' events on rank 0.
        """
        if step not in self.steps:
            return
        moment = (platform.node(), clock(), step, begun, ended, slices(record, begun, ended), flying(record))
        moments = self.grid.comm(tuple(self.grid.axes)).gather(moment)
        if moments is not None:
            self._add_all(moments)
            self._write()

    def _add_all(self, moments: Sequence[Any]) -> None:
        """Add the slices of all ranks on one clock: the counter of the first rank, which the ranks of a node share."""
        for host, offset, *_ in moments:
            self._offsets.setdefault(host, offset)
        first = self._offsets[moments[0][0]]
        # Differences of offsets: the time of day itself, in seconds, has no digits for nanoseconds.
        shifts = [self._offsets[host] - first for host, *_ in moments]
        if self._begun is None:
            self._begun = min(shift + begun for shift, (_, _, _, begun, *_) in zip(shifts, moments, strict=True))
        for rank, (_, _, step, begun, ended, own, under_way) in enumerate(moments):
            shift = shifts[rank] - self._begun
            self._events.append(_complete(rank, shift, (f"step {step}", "step", begun, ended, {"step": step})))
            self._events += [_complete(rank, shift, one) for one in own]
            for one in under_way:
                self._events += _asynchronous(rank, shift, one, len(self._events))

    def _write(self) -> None:
        events = [*_names(self.grid), *self._events]
        write_output(self.path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")))


def clock() -> float:
    """Return the offset of the time of day to ``time.perf_counter`` in seconds, the most precise of some tries."""
    tries = []
    for _ in range(5):
        before, now, after = time.perf_counter(), time.time(), time.perf_counter()
        tries.append((after - before, now - (before + after) / 2))
    return min(tries)[1]


def slices(record: ledger.Record, begun: float, ended: float) -> list[Slice]:
    """Return the slices of a rank's own work in a step: computations, and communication while it did nothing else.

    Waits for a message of another stage, and gaps, are idle.
    """
    made: list[Slice] = [(_title(span), span.kind, span.begun, span.ended, dict(span.what)) for span in record.spans]
    for event in record.events:
        name, what = _name(event), {"words": event.words, "bytes": event.bytes, "at": Path(event.site).name}
        waits = "idle" if event.op == "receive" else "comm"
        parts = (("comm", event.begun, event.posted), (waits, event.waited, event.ended))
        made += [(name, kind, start, stop, what) for kind, start, stop in parts if stop > start]
    top, last = [], begun
    for _, _, start, stop, _ in sorted(made, key=lambda one: (one[2], -one[3])):
        if start - last > _GAP:
            top.append(("between", "idle", last, start, dict[str, Any]()))
        last = max(last, stop)
    if ended - last > _GAP:
        top.append(("between", "idle", last, ended, {}))
    return made + top


def _title(span: ledger.Span) -> str:
    if "layer" in span.what:
        return str(span.what["layer"])
    parts = [f"microbatch {span.what['microbatch']}"] if "microbatch" in span.what else []
    parts += [f"chunk {span.what['chunk']}"] if span.what.get("chunk") else []
    return " ".join([span.kind, *parts])


def _name(event: ledger.Event) -> str:
    return f"{event.op} {event.axis}".strip()


def flying(record: ledger.Record) -> list[Slice]:
    """Return the communication that went on while the rank could do other things."""
    return [
        (_name(event), "comm", event.posted, event.waited, {"words": event.words, "bytes": event.bytes})
        for event in record.events
        if event.waited > event.posted > event.begun
    ]


def _micro(seconds: float) -> float:
    """Return microseconds, the unit of the format, rounded to nanoseconds."""
    return round(seconds * 1e6, 3)


def _complete(rank: int, shift: float, one: Slice) -> dict[str, Any]:
    name, kind, begun, ended, what = one
    start = _micro(begun + shift)
    return {
        "name": name,
        "cat": kind,
        "ph": "X",
        "ts": start,
        "dur": round(_micro(ended + shift) - start, 3),
        "pid": rank,
        "tid": _STEP,
        "args": what,
    }


def _asynchronous(rank: int, shift: float, one: Slice, number: int) -> Iterator[dict[str, Any]]:
    """Yield the two ends of a slice that may overlap other slices."""
    name, kind, begun, ended, what = one
    common = {"name": name, "cat": kind, "id": number, "pid": rank, "tid": _FLYING}
    yield {**common, "ph": "b", "ts": _micro(begun + shift), "args": what}
    yield {**common, "ph": "e", "ts": _micro(ended + shift)}


def _names(grid: Grid) -> Iterator[dict[str, Any]]:
    for rank in range(grid.size):
        place = ", ".join(f"{axis}={at}" for axis, at in grid.coords_of(rank).items())
        for what, tid, value in (
            ("process_name", _STEP, {"name": f"rank {rank} ({place})" if place else f"rank {rank}"}),
            ("process_sort_index", _STEP, {"sort_index": rank}),
            ("thread_name", _STEP, {"name": "step"}),
            ("thread_name", _FLYING, {"name": "under way"}),
        ):
            yield {"name": what, "ph": "M", "pid": rank, "tid": tid, "args": value}
