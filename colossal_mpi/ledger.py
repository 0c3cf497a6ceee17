"""The ledger: a record of every transfer, with its words, times and call site, and of the computations meanwhile.

`colossal_mpi.comm` enters every transfer; users, tests and the apps open records and read them. It gives the last
collectives to the signal handlers of ``runtime``, which print them for a rank that hangs. Words are counted by one
table, which the formulas of the documentation use too (n: the whole array, own: this rank's block, p: the ranks of the
group):

=================  =============================================
allgather          the blocks of the others: n - own
all_to_all         the pieces from the others
reduce_scatter     (p - 1) x own block of the result
allreduce          as reduce_scatter and allgather
bcast              n on each rank but the root
read               the elements used in other ranks' memory
receive            the elements of the message
send               nothing
=================  =============================================

Times are in seconds of ``time.perf_counter``, one clock for all ranks of a node. A dry run replaces it by a clock that
predicts the times of a machine (`timed_by`). Communication that goes on while the rank computes is begun at one
time and waited for at another; the computation between the two hides it.
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

from colossal_mpi.runtime import signals, watchdog

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
"""The modules of the communication code, which `site` skips."""
BELOW = {contextlib.__file__, *(f"{_CORE}/{name}.py" for name in _MOVERS)}
"""The files of these modules."""


@dataclass(frozen=True, slots=True)
class Event:
    """One collective, as this rank saw it.

    Parameters
    ----------
    op : str
        The name of the operation, from the table of the module.
    axes : tuple of str
        The grid axes that span the group.
    words : int
        The array elements that this rank received from others.
    bytes : int
        The bytes of these elements.
    site : str
        ``file:line`` of the first caller outside the communication code.
    begun, posted, waited, ended : float
        The times in seconds when the operation began, when the rank was free to go on (`begun` if it had to wait for
        the end), when it came back to wait, and when the operation was over.
    """

    op: str
    axes: tuple[str, ...]
    words: int
    bytes: int
    site: str
    begun: float
    posted: float
    waited: float
    ended: float

    @property
    def seconds(self) -> float:
        """The seconds that the rank itself spent on it: from `begun` to `posted` and from `waited` to `ended`."""
        return (self.posted - self.begun) + (self.ended - self.waited)

    @property
    def axis(self) -> str:
        """The axes, joined by commas."""
        return ",".join(self.axes)


@dataclass(frozen=True, slots=True)
class Span:
    """A computation of this rank, with the communication that it waits for.

    Parameters
    ----------
    kind : {"forward", "backward", "weight", "update"}
        The kind of computation.
    begun, ended : float
        The times in seconds.
    depth : int
        The number of spans that contain it.
    what : dict
        The part that was computed: its ``microbatch``, ``chunk`` and ``layer``.
    """

    kind: str
    begun: float
    ended: float
    depth: int
    what: dict[str, Any]


@dataclass(eq=False)  # two empty records are not the same record
class Record:
    """The events and spans of one ``with ledger.record()`` block, and their sums.

    Parameters
    ----------
    events : list of Event
        The collectives, in the order of their ends.
    spans : list of Span
        The computations, in the order of their ends.
    """

    events: list[Event] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def words(self) -> int:
        """The array elements that this rank received."""
        return sum(event.words for event in self.events)

    @property
    def bytes(self) -> int:
        """The bytes that this rank received."""
        return sum(event.bytes for event in self.events)

    @property
    def seconds(self) -> float:
        """The seconds that this rank spent inside collectives."""
        return sum(event.seconds for event in self.events)

    def by_axis(self) -> dict[str, int]:
        """Return the words received over each group of axes.

        Returns
        -------
        dict of str to int
            The words, by the names of the axes joined by commas.
        """
        sums: dict[str, int] = {}
        for event in self.events:
            sums[event.axis] = sums.get(event.axis, 0) + event.words
        return sums


_open: list[Record] = []
_recent: deque[tuple[Any, ...]] = deque(maxlen=20)
"""The values of this rank's last events, recorded or not: a plain tuple costs a third of an `Event`."""


@contextmanager
def record() -> Iterator[Record]:
    """Collect the events of this rank until the block ends; blocks may nest.

    Yields
    ------
    Record
        The record, which fills while the block runs.

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
    """Return ``file:line`` of the first caller outside the communication code; "" if no record is open."""
    if not _open:
        return ""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in BELOW:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Clock(Protocol):
    """A source of times, which can let time pass until messages have come."""

    def now(self) -> float:
        """Return the time in seconds."""

    def arrival(self, op: str, axes: Sequence[str], nbytes: int) -> float:
        """Return the time when a collective that begins now will have brought `nbytes` bytes.

        Parameters
        ----------
        op : str
            The operation.
        axes : sequence of str
            The axes of the group.
        nbytes : int
            Bytes that this rank receives.

        Returns
        -------
        float
            The time in seconds of this clock.
        """

    def wait(self, until: float) -> None:
        """Let time pass until `until`; a real clock does so by itself."""


class _Wall:
    """The real clock: a collective has come when MPI says so."""

    now = staticmethod(time.perf_counter)

    def arrival(self, op: str, axes: Sequence[str], nbytes: int) -> float:
        return 0.0

    def wait(self, until: float) -> None:
        pass


clock: Clock = _Wall()


@contextmanager
def timed_by(replacement: Clock) -> Iterator[None]:
    """Take all times from another clock until the context ends."""
    global clock
    before, clock = clock, replacement
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
    """Enter a collective that ends now into the open records.

    Parameters
    ----------
    op : str
        The operation.
    axes : tuple of str
        The axes of the group.
    words, itemsize : int
        Words that this rank received, and bytes of a word.
    begun : float
        When it began, in seconds of the clock.
    posted, waited : float, optional
        The times of `Event`, for a collective that went on while the rank computed.
    due : float, optional
        When it was expected to end.
    where : str
        The site that began it; by default the site of the caller.
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
    """Yield lines about the last collectives, for the report of a rank that hangs."""
    now = time.perf_counter()
    yield f"the last {len(_recent)} collectives, the oldest first:"
    for values in list(_recent):
        event = Event(*values)
        words, seconds = f"{event.words:,} words", f"{event.seconds * 1e3:.3f} ms, {now - event.ended:.1f} s ago"
        yield f"  {event.op} over {event.axis or 'no axis'}, {words} in {seconds}, {event.site}"


signals.sources.append(_history)


_current: list[tuple[str, dict[str, Any]]] = []
"""The kinds and parts of the spans that are open, from the outside in, recorded or not."""


def _place() -> str:
    """Return what this rank computes, for the messages of the watch over ranks that hang."""
    parts = [(kind, dict(what)) for kind, what in list(_current)]
    kinds = list(dict.fromkeys(kind for kind, _ in parts))
    what = {name: value for _, part in parts for name, value in part.items() if value != ""}
    layer = what.pop("layer", "")
    words = " in ".join(reversed(kinds)) + (f" of {layer}" if layer else "")
    return ", ".join([words, *(f"{name} {value}" for name, value in what.items())]) if words else ""


watchdog.places.append(_place)


class _Measured:
    """The context that says what this rank computes, and enters a span into the open records."""

    __slots__ = ("begun", "kind", "what")

    def __init__(self, kind: str, what: dict[str, Any]) -> None:
        self.kind, self.what = kind, what

    def __enter__(self) -> None:
        _current.append((self.kind, self.what))
        self.begun = clock.now() if _open else 0.0

    def __exit__(self, *_: object) -> None:
        _current.pop()
        if _open:
            measured = Span(self.kind, self.begun, clock.now(), len(_current), self.what)
            for rec in _open:
                rec.spans.append(measured)


def span(kind: str, **what: Any) -> contextlib.AbstractContextManager[None]:
    """Enter the computation inside the context into the open records, and say in messages about a hang what it is.

    Without a record it costs less than a microsecond.

    Parameters
    ----------
    kind : {"forward", "backward", "weight", "update"}
        The kind of computation.
    **what
        The part that is computed: its ``microbatch``, ``chunk`` and ``layer``.

    Returns
    -------
    context manager
        The context.

    Examples
    --------
    >>> with ledger.span("forward", layer="blocks.0"):
    ...     y, cache = block.forward(x, ctx)
    """
    return _Measured(kind, what)
