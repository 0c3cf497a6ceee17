"""Run the layers of a pipeline stage by a schedule: the one executor of all schedules."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Any, Protocol

import numpy as np

from colossal_mpi import backend, comm, exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import GridError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layers.schedule import (
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
    Transfer,
    program,
)
from colossal_mpi.layout import Layout, box_shape

PIPE = "pipe"
_STREAMS = {"x": 0, "dy": 1}
"""Of messages: activations and cotangents between the same stages may overtake one another."""
_AHEAD = 2
"""Receives that are posted before they are waited for, so that a message can arrive while the stage computes."""


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

    def stream(self, microbatch: int) -> tuple[tuple[int, ...], Layout, Any]:
        """Return global shape, layout and dtype of what goes from piece to piece."""


class Pipeline:
    """A model cut along ``pipe``: this rank's stage of it, and how a step goes through all of them.

    Parameters
    ----------
    chunks : sequence of Layer
        This stage's pieces of the model, in order, on ``grid.at(pipe=stage)``. Stage i of p has the pieces
        i, i + p, ... of the model.
    grid : Grid
        With an axis ``pipe``.
    schedule : {"gpipe", "1f1b", "interleaved", "zero-bubble"}

    Raises
    ------
    GridError
        If the grid has no such axis.
    OptionError
        If the schedule cannot have that many chunks.

    Notes
    -----
    **Communication:** between neighbours, ranks of the same coordinates, each microbatch's stream forward and its
    cotangent back: ``2 b s h`` words for each border between pieces, summed over ranks; one word for the loss.
    """

    def __init__(self, chunks: Sequence[Layer], grid: Grid, schedule: str = "1f1b") -> None:
        if PIPE not in grid.axes:
            raise GridError(f"a pipeline needs the axis {PIPE}; {grid} has none")
        self.chunks, self.grid, self.schedule = list(chunks), grid, schedule
        self.stage, self.stages = grid.coords[PIPE], grid.axes[PIPE]
        list(program(schedule, self.stages, 1, self.stage, len(self.chunks)))

    def step(self, feed: Feed) -> float:
        """Leave the gradients of all microbatches in the parameters; return the loss, the same on all ranks."""
        steps = list(program(self.schedule, self.stages, feed.microbatches, self.stage, len(self.chunks)))
        run = _Run(self, feed, steps)
        for step in steps:
            run.do(step)
        return run.finish()


class _Run:
    """One step under way. Arrays that pass between pieces are held by what they are, microbatch and chunk."""

    def __init__(self, pipeline: Pipeline, feed: Feed, steps: Sequence[Instruction]) -> None:
        self.pipeline, self.feed, self.total = pipeline, feed, 0.0
        self.place = pipeline.grid.at(**{PIPE: pipeline.stage})
        self.coming: dict[tuple[str, int, int], DistArray] = {}
        self.going: dict[tuple[str, int, int], DistArray] = {}
        self.caches: dict[tuple[int, int], Any] = {}
        self.later: dict[tuple[int, int], list[Any]] = {}
        self.sending: list[exchange.Pending] = []
        self.receives = deque(step for step in steps if isinstance(step, ReceiveActivation | ReceiveGradient))
        self.posted: deque[tuple[DistArray, exchange.Pending]] = deque()

    @singledispatchmethod
    def do(self, step: Instruction) -> None:
        """Carry out an instruction."""
        raise NotImplementedError(step)

    @do.register
    def _(self, step: Forward) -> None:
        mb, c, p = step.microbatch, step.chunk, self.pipeline
        x = self.feed.inputs(mb) if c == p.stage == 0 else self.coming.pop(("x", mb, c))
        y, cache = p.chunks[c].forward(x, self.feed.context(mb))
        saved = None
        if self._is_last(c):
            value, saved = self.feed.loss(y, mb)
            self.total += value
        else:
            self._hand_on("x", mb, c, 1, y)
        self.caches[mb, c] = cache, saved

    @do.register
    def _(self, step: BackwardInput) -> None:
        mb, c, p = step.microbatch, step.chunk, self.pipeline
        cache, saved = self.caches.pop((mb, c))
        dy = self.feed.loss_backward(saved) if self._is_last(c) else self.coming.pop(("dy", mb, c))
        dx = p.chunks[c].backward(dy, cache, self.later.setdefault((mb, c), []))
        if not c == p.stage == 0:
            self._hand_on("dy", mb, c, -1, dx)

    @do.register
    def _(self, step: BackwardWeight) -> None:
        for work in self.later.pop((step.microbatch, step.chunk)):
            work()

    def _hand_on(self, what: str, microbatch: int, chunk: int, by: int, array: DistArray) -> None:
        """Give an array to the piece before or behind: a stage alone has it itself."""
        if self.pipeline.stages == 1:
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
        self.sending.append(exchange.start(self.pipeline.grid, (PIPE,), send, [], _STREAMS[_what(step)]))

    @do.register(ReceiveActivation)
    @do.register(ReceiveGradient)
    def _(self, step: Transfer) -> None:
        while self.receives and len(self.posted) < _AHEAD:
            self._post(self.receives.popleft())
        array, pending = self.posted.popleft()
        pending.wait()
        what, stages = _what(step), self.pipeline.stages
        piece = step.chunk * stages + step.peer + (1 if what == "x" else -1)
        self.coming[what, step.microbatch, piece // stages] = array

    def _post(self, step: Transfer) -> None:
        shape, layout, dtype = self.feed.stream(step.microbatch)
        layout, place = layout.on(self.place.axes, len(shape)), self.place
        block = place.empty(box_shape(layout.box(shape, place.axes, place.coords)), dtype)
        pending = exchange.start(self.pipeline.grid, (PIPE,), [], [(step.peer, block)], _STREAMS[_what(step)])
        self.posted.append((DistArray(block, shape, layout, place), pending))

    def _is_last(self, chunk: int) -> bool:
        return chunk == len(self.pipeline.chunks) - 1 and self.pipeline.stage == self.pipeline.stages - 1

    def finish(self) -> float:
        """Wait for the last messages and return the loss."""
        for pending in self.sending:
            pending.wait()
        own = self.place.xp.asarray(np.float64(self.total))
        return float(backend.to_host(comm.bcast(own, self.pipeline.grid, (PIPE,), self.pipeline.stages - 1)))


def _what(step: Transfer) -> str:
    return "x" if isinstance(step, SendActivation | ReceiveActivation) else "dy"
