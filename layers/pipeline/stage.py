"""Carry out the instructions of one stage of a pipeline, whatever its schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any, Protocol

import numpy as np

from colossal_mpi import comm, ledger
from colossal_mpi.comm import Pending, start_exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layers.pipeline.schedule import (
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
    Transfer,
)
from colossal_mpi.layout import Layout, box_shape
from colossal_mpi.platform import backend

PIPE = "pipe"
_STREAMS = {"x": 0, "dy": 1}
"""Of messages: activations and cotangents between the same stages may overtake one another."""
_AHEAD = 2
"""Receives that are posted before they are waited for, so that a message can arrive while the stage computes."""


Stream = tuple[tuple[int, ...], Layout, Any]
"""Global shape, layout and dtype of what goes from piece to piece."""


class Feed(Protocol):
    """What a step computes on. Each method is called on the stages that need it, with the number of a microbatch."""

    microbatches: int

    def context(self, microbatch: int) -> Context:
        """Return what all layers may know."""

    def inputs(self, microbatch: int) -> DistArray:
        """Return the input of the first piece, on the grid of the first stage."""

    def loss(self, y: DistArray, microbatch: int) -> tuple[float, Any]:
        """Return the microbatch's share of the loss for the output of the last piece, and a cache."""

    def loss_backward(self, cache: Any) -> Any:
        """Return the cotangent of the output of the last piece."""

    def stream(self, microbatch: int) -> Stream:
        """Return what goes from piece to piece."""


@dataclass
class Once:
    """A feed of one forward pass, which keeps the outputs of the last piece."""

    x: Any
    ctx: Context
    border: Stream
    made: Any = None
    microbatches: int = 1

    def context(self, microbatch: int) -> Context:
        """Return the one context."""
        return self.ctx

    def inputs(self, microbatch: int) -> Any:
        """Return the one input."""
        return self.x

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        """Keep the outputs."""
        self.made = y
        return 0.0, None

    def loss_backward(self, cache: Any) -> Any:
        """There is no backward pass."""
        raise NotImplementedError

    def stream(self, microbatch: int) -> Stream:
        """Return the one border."""
        return self.border


@dataclass
class Stage:
    """One stage: its pieces of the model, and where it stands."""

    chunks: Sequence[Layer]
    grid: Grid
    """Of the whole model."""
    place: Grid
    """Of the stage alone."""
    number: int
    stages: int


class Run:
    """One step under way. Arrays that pass between pieces are held by what they are, microbatch and chunk."""

    def __init__(self, stage: Stage, feed: Feed, steps: Sequence[Instruction]) -> None:
        self.stage, self.feed, self.total = stage, feed, 0.0
        self.place = stage.place
        self.coming: dict[tuple[str, int, int], DistArray] = {}
        self.going: dict[tuple[str, int, int], DistArray] = {}
        self.caches: dict[tuple[int, int], Any] = {}
        self.later: dict[tuple[int, int], list[Any]] = {}
        self.sending: list[Pending] = []
        self.receives = deque(step for step in steps if isinstance(step, ReceiveActivation | ReceiveGradient))
        self.posted: deque[tuple[DistArray, Pending]] = deque()

    @singledispatchmethod
    def do(self, step: Instruction) -> None:
        """Carry out an instruction."""
        raise NotImplementedError(step)

    @do.register
    def _(self, step: Forward) -> None:
        mb, c, p = step.microbatch, step.chunk, self.stage
        with ledger.span("forward", microbatch=mb, chunk=c):
            x = self.feed.inputs(mb) if c == p.number == 0 else self.coming.pop(("x", mb, c))
            y, cache = p.chunks[c].forward(x, self.feed.context(mb))
            saved = None
            if self._is_last(c):
                value, saved = self.feed.loss(y, mb)
                self.total += value
        self.caches[mb, c] = cache, saved
        if not self._is_last(c):
            self._hand_on("x", mb, c, 1, y)

    @do.register
    def _(self, step: BackwardInput) -> None:
        mb, c, p = step.microbatch, step.chunk, self.stage
        cache, saved = self.caches.pop((mb, c))
        # Alone, a stage makes nobody wait: its weight products are done at once, and free what they need.
        later = self.later.setdefault((mb, c), [])
        with ledger.span("backward", microbatch=mb, chunk=c):
            dy = self.feed.loss_backward(saved) if self._is_last(c) else self.coming.pop(("dy", mb, c))
            dx = p.chunks[c].backward(dy, cache, None if p.stages == 1 else later)
        if not c == p.number == 0:
            self._hand_on("dy", mb, c, -1, dx)

    @do.register
    def _(self, step: BackwardWeight) -> None:
        with ledger.span("weight", microbatch=step.microbatch, chunk=step.chunk):
            for work in self.later.pop((step.microbatch, step.chunk)):
                work()

    def _hand_on(self, what: str, microbatch: int, chunk: int, by: int, array: DistArray) -> None:
        """Give an array to the piece before or behind: a stage alone has it itself."""
        if self.stage.stages == 1:
            self.coming[what, microbatch, chunk + by] = array
        else:
            self.going[what, microbatch, chunk] = array

    @do.register(SendActivation)
    @do.register(SendGradient)
    def _(self, step: Transfer) -> None:
        _, layout, _ = self.feed.stream(step.microbatch)
        array = self.going.pop((_what(step), step.microbatch, step.chunk)).redistribute(layout)
        self.sending = [pending for pending in self.sending if not pending.done()]
        send = [(step.peer, backend.contiguous(array.local))]
        self.sending.append(start_exchange(self.stage.grid, (PIPE,), send, [], _STREAMS[_what(step)], "send"))

    @do.register(ReceiveActivation)
    @do.register(ReceiveGradient)
    def _(self, step: Transfer) -> None:
        while self.receives and len(self.posted) < _AHEAD:
            self._post(self.receives.popleft())
        array, pending = self.posted.popleft()
        pending.wait()
        what, stages = _what(step), self.stage.stages
        piece = step.chunk * stages + step.peer + (1 if what == "x" else -1)
        self.coming[what, step.microbatch, piece // stages] = array

    def _post(self, step: Transfer) -> None:
        shape, layout, dtype = self.feed.stream(step.microbatch)
        layout, place = layout.on(self.place.axes, len(shape)), self.place
        block = place.empty(box_shape(layout.box(shape, place.axes, place.coords)), dtype)
        recv = [(step.peer, block)]
        pending = start_exchange(self.stage.grid, (PIPE,), [], recv, _STREAMS[_what(step)], "receive")
        self.posted.append((DistArray(block, shape, layout, place), pending))

    def passes(self, steps: Sequence[Instruction]) -> Iterator[tuple[str, Layer]]:
        """Yield the passes through the pieces of the model, ``forward`` and ``backward``, in order."""
        kinds = {Forward: "forward", BackwardInput: "backward"}
        return ((kinds[type(step)], self.stage.chunks[step.chunk]) for step in steps if type(step) in kinds)

    def _is_last(self, chunk: int) -> bool:
        return chunk == len(self.stage.chunks) - 1 and self.stage.number == self.stage.stages - 1

    def finish(self) -> float:
        """Wait for the last messages and return the loss."""
        for pending in self.sending:
            pending.wait()
        if self.stage.stages == 1:
            return self.total
        own = self.place.xp.asarray(np.float64(self.total))
        return float(backend.to_host(comm.bcast(own, self.stage.grid, (PIPE,), self.stage.stages - 1)))


def _what(step: Transfer) -> str:
    return "x" if isinstance(step, SendActivation | ReceiveActivation) else "dy"
