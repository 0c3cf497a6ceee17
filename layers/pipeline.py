"""Run the layers of a pipeline stage by a schedule: the one executor of all schedules."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Any, Protocol

import numpy as np

from colossal_mpi import backend, comm, exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import GridError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.layer import Chain, Context, Layer, Parameter
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
    balanced,
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


def cut(model: Chain, grid: Grid, chunks: int = 1, costs: Sequence[float] | None = None) -> list[Chain]:
    """Return this stage's pieces of a model, as `Pipeline` takes them.

    Parameters
    ----------
    model : Chain
        Made alike on every stage, on ``grid.at(pipe=stage)``; weights that are not asked for are never made.
    grid : Grid
        With an axis ``pipe``.
    chunks : int
        Pieces of a stage.
    costs : sequence of float, optional
        Of each layer of the chain, to balance the pieces by; by default its number of weights, those of the first
        layer, whose rows are looked up, not counted.

    Raises
    ------
    OptionError
        If there are more pieces than layers.
    """
    stages, stage = grid.axes[PIPE], grid.coords[PIPE]
    if costs is None:
        costs = [
            sum(math.prod(q.shape) for q in layer.parameters()) if i else 0 for i, layer in enumerate(model.layers)
        ]
    pieces = balanced(list(costs), stages * chunks)
    return [Chain(*[model.layers[i] for i in pieces[c * stages + stage]]) for c in range(chunks)]


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
        self.tied = self._tie()

    def parameters(self) -> list[Parameter]:
        """Return the parameters of this stage, each once."""
        found = {id(q): q for chunk in self.chunks for q in chunk.parameters()}
        return list(found.values())

    def _tie(self) -> list[tuple[Parameter, int]]:
        """Tell parameters of the whole model; return those that another stage has, too, by name, and that stage."""
        mine = {q.name: q for q in self.parameters()}
        names = comm.collect((self.stage, sorted(mine)), self.grid)
        holders: dict[str, set[int]] = {}
        for stage, held in names:
            for name in held:
                holders.setdefault(name, set()).add(stage)
        for name, parameter in mine.items():
            parameter.world, parameter.counted = self.grid, self.stage == min(holders[name])
        crowded = sorted(name for name, stages in holders.items() if len(stages) > 2)
        if crowded:
            raise GridError(
                f"parameters on more than two stages: {', '.join(crowded)}; a weight may be tied to one other"
            )
        shared = sorted(name for name in mine if len(holders[name]) == 2)
        return [(mine[name], next(iter(holders[name] - {self.stage}))) for name in shared]

    def step(self, feed: Feed) -> float:
        """Leave the gradients of all microbatches in the parameters; return the loss, the same on all ranks.

        The gradient of a weight that two stages hold is their sum on both, before it is reduced over data. A step is
        all that adds to gradients between two steps of an optimizer.
        """
        steps = list(program(self.schedule, self.stages, feed.microbatches, self.stage, len(self.chunks)))
        run = _Run(self, feed, steps)
        for step in steps:
            run.do(step)
        loss = run.finish()
        for parameter, other in self.tied:
            self._sum(parameter, other)
        return loss

    def _sum(self, parameter: Parameter, other: int) -> None:
        assert parameter.grad is not None
        layout = parameter.value.layout if parameter.deferred else parameter.owned
        mine = parameter.grad.redistribute(layout.with_partial(*parameter.deferred))
        theirs = backend.empty_like(mine.local, mine.local.shape)
        send = backend.contiguous(mine.local)
        exchange.start(self.grid, (PIPE,), [(other, send)], [(other, theirs)]).wait()
        pair = (mine.local, theirs) if self.stage < other else (theirs, mine.local)
        parameter.grad = mine.like(pair[0] + pair[1])  # in one order, so that both copies stay equal to the bit


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
