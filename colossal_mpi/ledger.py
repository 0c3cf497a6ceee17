"""The book-keeper: what every collective moved, where, and how long it took.

Words are counted by one table, which the formulas of the documentation use too (n: the whole array, own:
this rank's block, p: the ranks of the group):

=================  =============================================
allgather          what arrives: n - own
all_to_all         what arrives from others
reduce_scatter     (p - 1) x own block of the result
allreduce          as reduce_scatter and allgather
bcast              n on each rank but the root
read               what is used of the memory of other ranks
=================  =============================================
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_CORE = str(Path(__file__).parent)
_MOVERS = (
    "ledger",
    "comm",
    "exchange",
    "boxes",
    "redistribute",
    "slicing",
    "distarray",
    "linalg/pieces",
    "linalg/execute",
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
    seconds: float
    site: str
    """``file:line`` of the first caller outside the communication code."""

    @property
    def axis(self) -> str:
        """The axes, joined by ``,``."""
        return ",".join(self.axes)


@dataclass(eq=False)  # records are told apart by identity: two empty ones are not the same
class Record:
    """The events of one ``with ledger.record()`` block and their sums."""

    events: list[Event] = field(default_factory=list)

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


def _site() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename in _BELOW:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def post(op: str, axes: tuple[str, ...], words: int, itemsize: int, start: float) -> None:
    """Enter a collective that began at `start` (``time.perf_counter``) into the open records."""
    if _open:
        event = Event(op, axes, words, words * itemsize, time.perf_counter() - start, _site())
        for rec in _open:
            rec.events.append(event)
