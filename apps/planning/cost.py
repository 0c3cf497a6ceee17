"""What a step takes of one rank, of a dry run of it or of one microbatch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cached_property

from colossal_mpi import ledger
from colossal_mpi.layers.analysis.predict import Prediction
from colossal_mpi.layers.pipeline import BackwardInput, BackwardWeight, Forward, Instruction

_KINDS = {Forward: "forward", BackwardInput: "backward", BackwardWeight: "weight"}
_BETWEEN = ("send", "receive")
"""What the ledger calls messages between stages."""


class Cost:
    """What a step takes of a rank.

    Parameters
    ----------
    run : Prediction
        A dry run with a clock.
    others : int
        Microbatches of the step that the run left out: they are as the first one.
    live : float, optional
        Most microbatches that are kept at once, then.
    """

    def __init__(self, run: Prediction, others: int = 0, live: float | None = None) -> None:
        self.run, self.others = run, others
        self.live = run.live if live is None else live
        self.coords: Mapping[str, int] = run.coords
        self._passes = [s for s in run.record.spans if s.depth == 0 and s.kind in _KINDS.values()]

    @property
    def peak(self) -> int:
        """Bytes of arrays that are alive at any moment."""
        return self.run.peak + round((self.live - self.run.live) * self.run.saved)

    @property
    def stored(self) -> int:
        """Bytes of weights, gradients and the optimizer's state."""
        return self.run.weights + self.run.gradients + self.run.state

    @property
    def words(self) -> int:
        """Array elements received."""
        return sum(self.words_by_axis.values())

    @cached_property
    def words_by_axis(self) -> dict[str, int]:
        """Array elements received over each group of axes."""
        return {axis: round(words) for axis, words in self._sums(lambda event: event.words).items()}

    @cached_property
    def seconds_by_axis(self) -> dict[str, float]:
        """Seconds in which the rank does nothing but communicate over each group of axes."""
        return self._sums(lambda event: event.seconds)

    @property
    def messages(self) -> int:
        """Collectives, and messages between stages."""
        return round(sum(self._sums(lambda _: 1).values()))

    def _sums(self, value: Callable[[ledger.Event], float]) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for event in self.run.record.events:
            sums[event.axis] += value(event) * self._times(event)
        return dict(sums)

    def _times(self, event: ledger.Event) -> float:
        """Return how often a message is repeated in the step."""
        if not self.others:
            return 1
        if event.op in _BETWEEN:  # the run had two microbatches
            return 1 + self.others / 2
        inside = any(s.begun <= event.begun < s.ended for s in self._passes if s.what["microbatch"] == 0)
        return 1 + self.others * inside

    @property
    def border(self) -> int:
        """Bytes of the largest message between stages."""
        return max((e.bytes for e in self.run.record.events if e.op == "receive"), default=0)

    @cached_property
    def _seconds(self) -> dict[tuple[str, int, int], float]:
        sums: dict[tuple[str, int, int], float] = defaultdict(float)
        for span in self._passes:
            sums[span.kind, span.what["microbatch"], span.what["chunk"]] += span.ended - span.begun
        return sums

    def seconds_of(self, step: Instruction) -> float:
        """Return the time of a computation."""
        kind = _KINDS.get(type(step))
        if kind is None:
            return 0.0
        return self._seconds.get((kind, max(0, step.microbatch - self.others), step.chunk), 0.0)

    @property
    def busy(self) -> float:
        """Seconds of a step in which the rank does not wait for other stages."""
        times = {key: self.others + 1 if key[1] == 0 else 1 for key in self._seconds}
        return sum(seconds * times[key] for key, seconds in self._seconds.items()) + self.after

    @property
    def communicating(self) -> float:
        """Seconds of these in which it does nothing but communicate with ranks of its stage."""
        own = [event for event in self.run.record.events if event.op not in _BETWEEN]
        return sum(event.seconds * self._times(event) for event in own)

    @property
    def after(self) -> float:
        """Seconds of a step besides its passes and messages between stages: reductions, update."""
        waits = sum(event.seconds for event in self.run.record.events if event.op in _BETWEEN)
        return max(0.0, self.run.seconds - sum(self._seconds.values()) - waits)
