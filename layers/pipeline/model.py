"""Models cut along ``pipe``: their pieces, the steps of a schedule, weights that two stages share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from colossal_mpi import comm
from colossal_mpi.comm import start_exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import GridError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layers.overlap.buckets import SIZE, GradientBuckets
from colossal_mpi.layers.overlap.prefetch import Prefetch
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.pipeline.schedule import (
    Forward,
    Instruction,
    ReceiveActivation,
    SendActivation,
    balanced,
    program,
)
from colossal_mpi.layers.pipeline.stage import PIPE, Feed, Once, Run, Stage, Stream
from colossal_mpi.layout import box_shape, rank_of
from colossal_mpi.platform import backend


def place_of(grid: Grid) -> Grid:
    """Return the grid of this rank's stage."""
    return grid.at(**{PIPE: grid.coords[PIPE]}) if PIPE in grid.axes else grid


def cut(model: Sequential, grid: Grid, chunks: int = 1, costs: Sequence[float] | None = None) -> list[Sequential]:
    """Return this stage's pieces of a model, as `Pipeline` takes them.

    Parameters
    ----------
    model : Sequential
        Made alike on every stage, on ``grid.at(pipe=stage)``; weights that are not asked for are never made.
    grid : Grid
        With an axis ``pipe``; without one it is one stage.
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
    stages, stage = grid.axes.get(PIPE, 1), grid.coords.get(PIPE, 0)
    return [Sequential(*layers) for layers in pieces(model, stages, chunks, costs)[stage]]


def pieces(
    model: Sequential, stages: int, chunks: int = 1, costs: Sequence[float] | None = None
) -> list[list[list[Layer]]]:
    """Return the layers of each chunk of each stage, as `cut` gives them to a stage."""
    if costs is None:
        costs = [
            sum(math.prod(q.shape) for q in layer.parameters()) if i else 0 for i, layer in enumerate(model.layers)
        ]
    found = balanced(list(costs), stages * chunks)
    return [[[model.layers[i] for i in found[c * stages + stage]] for c in range(chunks)] for stage in range(stages)]


def held(model: Sequential, grid: Grid, chunks: int = 1) -> list[list[str]]:
    """Return the names of each stage's parameters, as `cut` deals them out: what `Pipeline` need not ask for then."""
    return [
        sorted({q.name for piece in some for layer in piece for q in layer.parameters()})
        for some in pieces(model, grid.axes.get(PIPE, 1), chunks)
    ]


class Pipeline(Stage):
    """A model cut along ``pipe``: this rank's stage of it, and how a step goes through all of them.

    Parameters
    ----------
    chunks : sequence of Layer
        This stage's pieces of the model, in order, on ``grid.at(pipe=stage)``. Stage i of p has the pieces
        i, i + p, ... of the model.
    grid : Grid
        With an axis ``pipe``; without one it is one stage.
    schedule : {"gpipe", "1f1b", "interleaved", "zero-bubble"}
    bucket : int
        Bytes of gradients that are reduced over ``data`` together, begun while the step goes on.
    held : sequence of sequence of str, optional
        The names of each stage's parameters; by default the stages tell one another.

    Raises
    ------
    GridError
        If a weight is on more than two stages, or a stage has none.
    OptionError
        If the schedule cannot have that many chunks.

    Notes
    -----
    **Communication:** between neighbours, ranks of the same coordinates, each microbatch's stream forward and its
    cotangent back: ``2 b s h`` words for each border between pieces, summed over ranks; one word for the loss.
    """

    def __init__(
        self,
        chunks: Sequence[Layer],
        grid: Grid,
        schedule: str = "1f1b",
        bucket: int = SIZE,
        held: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__(list(chunks), grid, place_of(grid), grid.coords.get(PIPE, 0), grid.axes.get(PIPE, 1))
        self.schedule, self.bucket, self.prefetch = schedule, bucket, Prefetch()
        self._program(1)
        self.tied = self._tie(held)

    def _program(self, microbatches: int) -> list[Instruction]:
        return list(program(self.schedule, self.stages, microbatches, self.number, len(self.chunks)))

    def parameters(self) -> list[Parameter]:
        """Return the parameters of this stage, each once."""
        found = {id(q): q for chunk in self.chunks for q in chunk.parameters()}
        return list(found.values())

    def _tie(self, held_by: Sequence[Sequence[str]] | None) -> list[tuple[Parameter, int]]:
        """Tell parameters of the whole model; return those that another stage has, too, by name, and that stage."""
        mine = {q.name: q for q in self.parameters()}
        told = (self.number, sorted(mine))
        names = comm.collect(told, self.grid) if held_by is None else list(enumerate(held_by))
        empty = sorted({stage for stage, held in names if not held})
        if empty:
            raise GridError(f"stages without weights: {', '.join(map(str, empty))} of {self.stages}; use fewer stages")
        holders: dict[str, set[int]] = {}
        for stage, held in names:
            for name in held:
                holders.setdefault(name, set()).add(stage)
        for name, parameter in mine.items():
            parameter.world, parameter.counted = self.grid, self.number == min(holders[name])
        crowded = sorted(name for name, stages in holders.items() if len(stages) > 2)
        if crowded:
            raise GridError(
                f"parameters on more than two stages: {', '.join(crowded)}; a weight may be tied to one other"
            )
        shared = sorted(name for name in mine if len(holders[name]) == 2)
        return [(mine[name], next(iter(holders[name] - {self.number}))) for name in shared]

    def step(self, feed: Feed) -> float:
        """Leave the gradients of all microbatches in the parameters; return the loss, the same on all ranks.

        Their reductions over data are under way: `Parameter.reduce` waits for them. The gradient of a weight that two
        stages hold is their sum on both, before it is reduced over data. A step is all that adds to gradients between
        two steps of an optimizer.
        """
        steps = self._program(feed.microbatches)
        run = Run(self, feed, steps)
        with (
            GradientBuckets(self.chunks, feed.microbatches, self.bucket) as buckets,
            self.prefetch.over(self.chunks, run.passes(steps)),
        ):
            for parameter, _ in self.tied:
                buckets.hold(parameter)
            for step in steps:
                run.do(step)
            loss = run.finish()
            for parameter, other in self.tied:
                self._sum(parameter, other)
                buckets.counted(parameter)
        return loss

    def forward(self, x: Any, ctx: Context, stream: Stream) -> Any:
        """Return what the model makes of `x`, on the last stage; None on the others.

        Parameters
        ----------
        x : DistArray
            The model's input, on the grid of the first stage.
        ctx : Context
        stream : (shape, layout, dtype)
            As `Feed.stream` gives it.

        **Communication:** the stream once over each border, and a word.
        """
        feed = Once(x, ctx, stream)
        kinds = (Forward, ReceiveActivation, SendActivation)
        forwards = [step for step in self._program(1) if isinstance(step, kinds)]
        run = Run(self, feed, forwards)
        with self.prefetch.over(self.chunks, run.passes(forwards)):
            for step in forwards:
                run.do(step)
            run.finish()
        return feed.made

    def outputs(self, x: Any, ctx: Context, stream: Stream) -> Any:
        """Return what the model makes of `x`, on all stages; parameters are those of `forward`.

        **Communication:** the stream once over each border, and a bcast of the outputs along ``pipe``.
        """
        return self._everywhere(self.forward(x, ctx, stream))

    def _everywhere(self, made: Any) -> Any:
        """Return the arrays of the last stage on all stages."""
        if self.stages == 1:
            return made
        last = self.number == self.stages - 1
        arrays = list(made) if isinstance(made, tuple) else [made]
        told = [(a.shape, a.layout, str(backend.numpy_dtype(a.dtype))) for a in arrays] if last else None
        told = comm.share((isinstance(made, tuple), told), self.grid, rank_of(self._end(), self.grid.axes))
        found = [self._spread(what, arrays[i] if last else None) for i, what in enumerate(told[1])]
        return tuple(found) if told[0] else found[0]

    def _end(self) -> dict[str, int]:
        return {axis: self.stages - 1 if axis == PIPE else 0 for axis in self.grid.axes}

    def _spread(self, what: Stream, array: DistArray | None) -> DistArray:
        shape, layout, dtype = what
        box = layout.box(shape, self.place.axes, self.place.coords)
        block = self.place.empty(box_shape(box), dtype) if array is None else backend.contiguous(array.local)
        return DistArray(comm.bcast(block, self.grid, (PIPE,), self.stages - 1), shape, layout, self.place)

    def _sum(self, parameter: Parameter, other: int) -> None:
        if not parameter.deferred:
            parameter.reduce()
        assert parameter.grad is not None
        layout = parameter.value.layout if parameter.deferred else parameter.owned
        mine = parameter.grad.redistribute(layout.with_partial(*parameter.deferred))
        theirs = backend.empty_like(mine.local, mine.local.shape)
        send = backend.contiguous(mine.local)
        start_exchange(self.grid, (PIPE,), [(other, send)], [(other, theirs)]).wait()
        pair = (mine.local, theirs) if self.number < other else (theirs, mine.local)
        parameter.grad = mine.like(pair[0] + pair[1])  # in one order, so that both copies stay equal to the bit
