"""The book-keeper: what every collective moved, where and when, and what was computed meanwhile.

Words are counted by one table, which the formulas of the documentation use too (n: the whole array, own:
this rank's block, p: the ranks of the group):

=================  =============================================
allgather          what arrives: n - own
all_to_all         what arrives from others
reduce_scatter     (p - 1) x own block of the result
allreduce          as reduce_scatter and allgather
bcast              n on each rank but the root
read               what is used of the memory of other ranks
receive            what arrives of a message to one rank
send               nothing
=================  =============================================

Times are in seconds of ``time.perf_counter``, one clock for all ranks of a node; those of a dry run may be of a clock
that knows what a machine would take (`timed_by`). What goes on while the rank computes
was begun at one time and waited for at another: the spans of computation between the two hide it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from colossal_mpi.runtime import signals

_CORE = str(Path(__file__).parent)
_MOVERS = (
    "ledger",
    "distarray",
    "comm/collectives",
    "comm/messages",
    "comm/transport",
    "redistribution/plan",
    "redistribution/execute",
    "redistribution/gather",
    "redistribution/indexing",
    "linalg/contraction/operands",
    "linalg/contraction/execute",
)
_BELOW = {contextlib.__file__, *(f"{_CORE}/{name}.py" for name in _MOVERS)}


@dataclass(frozen=True, slots=True)
class Event:
    """One collective, as this rank saw it."""

    op: str
    axes: tuple[str, ...]
    """The grid axes that span the group."""
    words: int
    """Array elements received by this rank from others."""
    bytes: int
    site: str
    """``file:line`` of the first caller outside the communication code."""
    begun: float
    posted: float
    """When the rank was free to go on; `begun` if it was not before the end."""
    waited: float
    """When it came back to wait for it."""
    ended: float

    @property
    def seconds(self) -> float:
        """The time that the rank itself spent on it: from `begun` to `posted` and from `waited` to `ended`."""
        return (self.posted - self.begun) + (self.ended - self.waited)

    @property
    def axis(self) -> str:
        """The axes, joined by ``,``."""
        return ",".join(self.axes)


@dataclass(frozen=True, slots=True)
class Span:
    """A computation of this rank, communication that it waits for included."""

    kind: str
    """``forward``, ``backward``, ``weight`` or ``update``."""
    begun: float
    ended: float
    depth: int
    """How many spans it lies in."""
    what: dict[str, Any]
    """``microbatch``, ``chunk``, ``layer``: what it was of."""


@dataclass(eq=False)  # records are told apart by identity: two empty ones are not the same
class Record:
    """The events and spans of one ``with ledger.record()`` block, each entered at its end, and their sums."""

    events: list[Event] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def words(self) -> int:
        """Array elements that this rank received."""
        return sum(event.words for event in self.events)

    @property
    def bytes(self) -> int:
        """Bytes that this rank received."""
        return sum(event.bytes for event in self.events)

    @property
    def seconds(self) -> float:
        """Seconds that this rank spent inside collectives."""
        return sum(event.seconds for event in self.events)

    def by_axis(self) -> dict[str, int]:
        """Return the words received over each group of axes."""
        sums: dict[str, int] = {}
        for event in self.events:
            sums[event.axis] = sums.get(event.axis, 0) + event.words
        return sums


_open: list[Record] = []
_recent: deque[tuple[Any, ...]] = deque(maxlen=20)
"""The last collectives of this rank, recorded or not, as the values of their events: plain tuples cost a third."""


@contextmanager
def record() -> Iterator[Record]:
    """Collect the events of this rank until the block ends; blocks may nest.

    Examples
    --------
    >>> with ledger.record() as rec:
    ...     C = A @ B
    >>> rec.words
    """
    rec = Record()
    _open.append(rec)
    try:
        yield rec
    finally:
        _open.remove(rec)


def site() -> str:
    """Return ``file:line`` of the first caller outside the communication code, "" if no record is open."""
    if not _open:
        return ""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _BELOW:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Clock(Protocol):
    """What tells the time, and lets it pass until messages have come."""

    def now(self) -> float:
        """Return a time in seconds."""

    def arrival(self, op: str, axes: Sequence[str], nbytes: int) -> float:
        """Return when a collective that begins now will have brought so many bytes."""

    def wait(self, until: float) -> None:
        """Let time pass, which of its own does not."""


class _Wall:
    """The clock on the wall: a collective has come when MPI says so."""

    now = staticmethod(time.perf_counter)

    def arrival(self, op: str, axes: Sequence[str], nbytes: int) -> float:
        return 0.0

    def wait(self, until: float) -> None:
        pass


clock: Clock = _Wall()


@contextmanager
def timed_by(other: Clock) -> Iterator[None]:
    """Take all times from another clock until the block ends."""
    global clock
    before, clock = clock, other
    try:
        yield
    finally:
        clock = before


def post(
    op: str,
    axes: tuple[str, ...],
    words: int,
    itemsize: int,
    begun: float,
    posted: float | None = None,
    waited: float | None = None,
    due: float | None = None,
    where: str = "",
) -> None:
    """Enter a collective that ends now into the open records; it began at `begun`, by the clock.

    One that the rank did not wait for at once was posted and waited for at those times, from the site `where`, and was
    to come when the clock said.
    """
    clock.wait(clock.arrival(op, axes, words * itemsize) if due is None else due)
    now = clock.now()
    values = (op, axes, words, words * itemsize, where or site(), begun, posted or begun, waited or begun, now)
    _recent.append(values)
    if _open:
        event = Event(*values)
        for rec in _open:
            rec.events.append(event)


def _history() -> Iterator[str]:
    now = time.perf_counter()
    yield f"the last {len(_recent)} collectives, the oldest first:"
    for values in list(_recent):
        event = Event(*values)
        words, seconds = f"{event.words:,} words", f"{event.seconds * 1e3:.3f} ms, {now - event.ended:.1f} s ago"
        yield f"  {event.op} over {event.axis or 'no axis'}, {words} in {seconds}, {event.site}"


signals.sources.append(_history)


class _Measured:
    """The context of a span."""

    __slots__ = ("begun", "kind", "what")
    depth = 0
    """How many of them are open."""

    def __init__(self, kind: str, what: dict[str, Any]) -> None:
        self.kind, self.what = kind, what

    def __enter__(self) -> None:
        _Measured.depth += 1
        self.begun = clock.now()

    def __exit__(self, *_: object) -> None:
        _Measured.depth -= 1
        made = Span(self.kind, self.begun, clock.now(), _Measured.depth, self.what)
        for rec in _open:
            rec.spans.append(made)


_unmeasured = contextlib.nullcontext()


def span(kind: str, **what: Any) -> contextlib.AbstractContextManager[None]:
    """Enter the computation inside the context into the open records; without one it costs next to nothing.

    Parameters
    ----------
    kind : {"forward", "backward", "weight", "update"}
    **what
        ``microbatch``, ``chunk``, ``layer``.

    Examples
    --------
    >>> with ledger.span("forward", layer="blocks.0"):
    ...     y, cache = block.forward(x, ctx)
    """
    return _Measured(kind, what) if _open else _unmeasured
