"""One stage of a pipeline: its chunks of the model, the data of a step, and the execution of instructions.

`Pipeline` extends `Stage` and gives the instructions of its schedule to a `StepExecutor`, which calls the layers and
exchanges activations and cotangents with the neighbouring stages through ``comm.messages``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any, Protocol

import numpy as np

from colossal_mpi import comm, ledger
from colossal_mpi.comm import Pending, start_exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.pipeline.partition import PIPE
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

_TAGS = {"x": 0, "dy": 1}
"""Activations and cotangents between the same stages have different tags, so that they may overtake one another."""
_POSTED = 2
"""Number of receives that are posted before the stage waits for them, so that messages arrive while it computes."""

ArraySpec = tuple[tuple[int, ...], Layout, Any]
"""Global shape, layout and dtype of an array."""


class StepData(Protocol):
    """The data and the loss of one training step, microbatch by microbatch.

    A pipeline calls each method on the stages that need it, with the number of a microbatch.

    Attributes
    ----------
    microbatches : int
        Number of microbatches of the step.
    """

    microbatches: int

    def context(self, microbatch: int) -> Context:
        """Return the context that all layers take.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        Context
            Context of the forward pass.
        """

    def inputs(self, microbatch: int) -> DistArray:
        """Return the input of the first chunk.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        DistArray
            Input on the grid of the first stage, such as token ids ``[b, s]``.
        """

    def loss(self, y: DistArray, microbatch: int) -> tuple[float, Any]:
        """Return the microbatch's share of the loss of the step, and the cache that `loss_backward` takes.

        Parameters
        ----------
        y : DistArray
            Output of the last chunk.
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        loss : float
            Share of the loss, the same on all ranks of the stage.
        cache : object
            The input of `loss_backward`.
        """

    def loss_backward(self, cache: Any) -> Any:
        """Return the cotangent of the output of the last chunk.

        Parameters
        ----------
        cache : object
            What `loss` returned.

        Returns
        -------
        DistArray
            Cotangent of the output.
        """

    def activation_spec(self, microbatch: int) -> ArraySpec:
        """Return the shape, layout and dtype of the activation between chunks.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        tuple of (shape, Layout, dtype)
            Global shape, such as ``(b, s, h)``, layout on the grid of a stage, and dtype.
        """


@dataclass
class ForwardOnly:
    """The data of a single forward pass, which keeps the output of the last chunk."""

    x: Any
    ctx: Context
    spec: ArraySpec
    output: Any = None
    microbatches: int = 1

    def context(self, microbatch: int) -> Context:
        """Return the only context."""
        return self.ctx

    def inputs(self, microbatch: int) -> Any:
        """Return the only input."""
        return self.x

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        """Keep the output."""
        self.output = y
        return 0.0, None

    def loss_backward(self, cache: Any) -> Any:
        """Raise: there is no backward pass."""
        raise NotImplementedError

    def activation_spec(self, microbatch: int) -> ArraySpec:
        """Return the only shape, layout and dtype."""
        return self.spec


@dataclass
class Stage:
    """One stage of a pipeline.

    Parameters
    ----------
    chunks : sequence of Layer
        Chunks of the model that this stage holds, in the order of the model.
    grid : Grid
        Grid of the whole model.
    stage_grid : Grid
        Grid of this stage's ranks.
    stage : int
        Number of the stage, from 0.
    stages : int
        Number of stages.
    """

    chunks: Sequence[Layer]
    grid: Grid
    stage_grid: Grid
    stage: int
    stages: int


class StepExecutor:
    """The execution of one training step on one stage, instruction by instruction.

    Parameters
    ----------
    stage : Stage
        The stage.
    data : StepData
        Data and loss of the step.
    instructions : sequence of Instruction
        All instructions of the step, so that receives can be posted ahead.
    """

    def __init__(self, stage: Stage, data: StepData, instructions: Sequence[Instruction]) -> None:
        self.stage, self.data, self.loss = stage, data, 0.0
        # Arrays between chunks, by ("x" or "dy", microbatch, chunk).
        self._received: dict[tuple[str, int, int], DistArray] = {}
        self._to_send: dict[tuple[str, int, int], DistArray] = {}
        self._caches: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._weight_products: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._sends: list[Pending] = []
        self._receives = deque(i for i in instructions if isinstance(i, ReceiveActivation | ReceiveGradient))
        self._posted: deque[tuple[DistArray, Pending]] = deque()

    @singledispatchmethod
    def execute(self, step: Instruction) -> None:
        """Execute an instruction."""
        raise NotImplementedError(step)

    @execute.register
    def _(self, step: Forward) -> None:
        mb, c, own = step.microbatch, step.chunk, self.stage
        with ledger.span("forward", microbatch=mb, chunk=c):
            x = self.data.inputs(mb) if c == own.stage == 0 else self._received.pop(("x", mb, c))
            y, cache = own.chunks[c].forward(x, self.data.context(mb))
            loss_cache = None
            if self._is_last(c):
                share, loss_cache = self.data.loss(y, mb)
                self.loss += share
        self._caches[mb, c] = cache, loss_cache
        if not self._is_last(c):
            self._hand_on("x", mb, c, 1, y)

    @execute.register
    def _(self, step: BackwardInput) -> None:
        mb, c, own = step.microbatch, step.chunk, self.stage
        cache, loss_cache = self._caches.pop((mb, c))
        # No stage waits for a single stage: it does its weight products at once, which frees their operands.
        later = self._weight_products.setdefault((mb, c), [])
        with ledger.span("backward", microbatch=mb, chunk=c):
            dy = self.data.loss_backward(loss_cache) if self._is_last(c) else self._received.pop(("dy", mb, c))
            dx = own.chunks[c].backward(dy, cache, None if own.stages == 1 else later)
        if not c == own.stage == 0:
            self._hand_on("dy", mb, c, -1, dx)

    @execute.register
    def _(self, step: BackwardWeight) -> None:
        with ledger.span("weight", microbatch=step.microbatch, chunk=step.chunk):
            for product in self._weight_products.pop((step.microbatch, step.chunk)):
                product()

    def _hand_on(self, what: str, microbatch: int, chunk: int, by: int, array: DistArray) -> None:
        """Give an array to the next chunk (`by` 1) or the one before (-1). A single stage holds both."""
        if self.stage.stages == 1:
            self._received[what, microbatch, chunk + by] = array
        else:
            self._to_send[what, microbatch, chunk] = array

    @execute.register(SendActivation)
    @execute.register(SendGradient)
    def _(self, step: Transfer) -> None:
        _, layout, _ = self.data.activation_spec(step.microbatch)
        # X[B, S, H] in the layout of the stream, stage i -> stage `peer`: send of this rank's block over pipe
        array = self._to_send.pop((_kind(step), step.microbatch, step.chunk)).redistribute(layout)
        self._sends = [pending for pending in self._sends if not pending.done()]
        send = [(step.peer, backend.contiguous(array.local))]
        self._sends.append(start_exchange(self.stage.grid, (PIPE,), send, [], _TAGS[_kind(step)], "send"))

    @execute.register(ReceiveActivation)
    @execute.register(ReceiveGradient)
    def _(self, step: Transfer) -> None:
        while self._receives and len(self._posted) < _POSTED:
            self._post(self._receives.popleft())
        array, pending = self._posted.popleft()
        pending.wait()
        kind, stages = _kind(step), self.stage.stages
        number = step.chunk * stages + step.peer + (1 if kind == "x" else -1)
        self._received[kind, step.microbatch, number // stages] = array

    def _post(self, step: Transfer) -> None:
        """Post the receive of an activation or a cotangent."""
        shape, layout, dtype = self.data.activation_spec(step.microbatch)
        own = self.stage.stage_grid
        layout = layout.on(own.axes, len(shape))
        block = own.empty(box_shape(layout.box(shape, own.axes, own.coords)), dtype)
        # X[B, S, H] in the layout of the stream, stage `peer` -> stage i: receive of this rank's block over pipe
        recv = [(step.peer, block)]
        pending = start_exchange(self.stage.grid, (PIPE,), [], recv, _TAGS[_kind(step)], "receive")
        self._posted.append((DistArray(block, shape, layout, own), pending))

    def passes(self, instructions: Sequence[Instruction]) -> Iterator[tuple[str, Layer]]:
        """Yield the passes through chunks, ``forward`` or ``backward`` with the chunk, in order."""
        names = {Forward: "forward", BackwardInput: "backward"}
        return ((names[type(i)], self.stage.chunks[i.chunk]) for i in instructions if type(i) in names)

    def _is_last(self, chunk: int) -> bool:
        return chunk == len(self.stage.chunks) - 1 and self.stage.stage == self.stage.stages - 1

    def finish(self) -> float:
        """Wait for the last sends and return the loss of the step, the same on all ranks."""
        for pending in self._sends:
            pending.wait()
        if self.stage.stages == 1:
            return self.loss
        # loss[] on the last stage -> loss[] on all stages: bcast of one word over pipe
        own = self.stage.stage_grid.xp.asarray(np.float64(self.loss))
        return float(backend.to_host(comm.bcast(own, self.stage.grid, (PIPE,), self.stage.stages - 1)))


def _kind(step: Transfer) -> str:
    """Return ``"x"`` for an activation, ``"dy"`` for a cotangent."""
    return "x" if isinstance(step, SendActivation | ReceiveActivation) else "dy"
