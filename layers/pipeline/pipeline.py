"""A model cut into stages along ``pipe``: its training step, its forward pass, and weights that two stages hold.

The trainer calls `Pipeline.step` and then the optimizer; ``generate`` calls `Pipeline.forward`. The pipeline carries
out its schedule with a `StepExecutor` and reduces gradients over ``data`` in buckets while the step goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colossal_mpi import comm
from colossal_mpi.comm import start_exchange
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import GridError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.overlap import BUCKET_BYTES, GradientBuckets, Prefetch
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.pipeline.partition import PIPE, stage_grid
from colossal_mpi.layers.pipeline.schedule import (
    Forward,
    Instruction,
    ReceiveActivation,
    SendActivation,
    program,
)
from colossal_mpi.layers.pipeline.stage import ArraySpec, ForwardOnly, Stage, StepData, StepExecutor
from colossal_mpi.layout import box_shape, rank_of
from colossal_mpi.platform import backend


class Pipeline(Stage):
    """A model cut along ``pipe``: this rank's stage, and the training step through all stages.

    Parameters
    ----------
    chunks : sequence of Layer
        Chunks of the model that this stage holds, in order, on the grid that `stage_grid` returns. Stage i of p holds
        the chunks i, i + p, ... of the model, as `partition` returns them.
    grid : Grid
        Grid of the whole model. Without an axis ``pipe`` it is one stage.
    schedule : str
        Name of a registered schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"zero-bubble"`` or another one of
        `SCHEDULES`.
    bucket : int
        Bytes of gradients that are reduced over ``data`` together, while the step goes on.
    names : sequence of sequence of str, optional
        Names of each stage's parameters, as `parameter_names` returns them. By default the stages gather them.

    Attributes
    ----------
    tied : list of (Parameter, int)
        Parameters of this stage that another stage holds, too, each with the number of that stage.

    Raises
    ------
    GridError
        If a weight is on more than two stages, or a stage has none.
    OptionError
        If the schedule is not registered or cannot have that many chunks.

    Notes
    -----
    **Communication:** between ranks with the same coordinates on neighbouring stages, for each microbatch the
    activation forward and its cotangent back: ``2 b s h`` words for each border between chunks, summed over ranks.
    One word for the loss.

    References
    ----------
    Narayanan et al.: Efficient large-scale language model training on GPU clusters, 2021.

    Examples
    --------
    >>> pipeline = Pipeline(partition(model, grid), grid, "1f1b")
    >>> loss = pipeline.step(data)
    >>> optimizer.step()
    """

    def __init__(
        self,
        chunks: Sequence[Layer],
        grid: Grid,
        schedule: str = "1f1b",
        bucket: int = BUCKET_BYTES,
        names: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__(list(chunks), grid, stage_grid(grid), grid.coords.get(PIPE, 0), grid.axes.get(PIPE, 1))
        self.schedule, self.bucket, self.prefetch = schedule, bucket, Prefetch()
        self._program(1)
        self.tied = self._tie(names)

    def _program(self, microbatches: int) -> list[Instruction]:
        return list(program(self.schedule, self.stages, microbatches, self.stage, len(self.chunks)))

    def parameters(self) -> list[Parameter]:
        """Return the parameters of this stage, each once.

        Returns
        -------
        list of Parameter
            Parameters in the order of the chunks.
        """
        found = {id(q): q for chunk in self.chunks for q in chunk.parameters()}
        return list(found.values())

    def _tie(self, given: Sequence[Sequence[str]] | None) -> list[tuple[Parameter, int]]:
        """Give parameters the whole model's grid, and return each one that two stages hold, with the other stage."""
        parameters = {q.name: q for q in self.parameters()}
        own = (self.stage, sorted(parameters))
        # the names of each stage -> the names of all stages: allgather
        names_of = comm.collect(own, self.grid) if given is None else list(enumerate(given))
        empty = sorted({stage for stage, names in names_of if not names})
        if empty:
            raise GridError(f"stages without weights: {', '.join(map(str, empty))} of {self.stages}; use fewer stages")
        holders: dict[str, set[int]] = {}
        for stage, names in names_of:
            for name in names:
                holders.setdefault(name, set()).add(stage)
        for name, parameter in parameters.items():
            parameter.world, parameter.counted = self.grid, self.stage == min(holders[name])
        crowded = sorted(name for name, stages in holders.items() if len(stages) > 2)
        if crowded:
            raise GridError(
                f"parameters on more than two stages: {', '.join(crowded)}; a weight may be tied to one other"
            )
        shared = sorted(name for name in parameters if len(holders[name]) == 2)
        return [(parameters[name], next(iter(holders[name] - {self.stage}))) for name in shared]

    def step(self, data: StepData) -> float:
        """Run the forward and backward passes of all microbatches, and leave the gradients in the parameters.

        The reductions of the gradients over ``data`` are still under way when it returns: `Parameter.reduce` waits for
        them. Between two steps of an optimizer only one such step may add to the gradients.

        Parameters
        ----------
        data : StepData
            Data and loss of the step.

        Returns
        -------
        float
            Loss of the step, the same on all ranks.

        Notes
        -----
        **Communication:** activations and cotangents between stages, as the class says, the messages of the layers,
        and the reductions of `GradientBuckets`. The gradient of a weight that two stages hold is exchanged between
        them once, and added in the order of the stages, before it is reduced over ``data``.
        """
        instructions = self._program(data.microbatches)
        executor = StepExecutor(self, data, instructions)
        with (
            GradientBuckets(self.chunks, data.microbatches, self.bucket) as buckets,
            self.prefetch.over(self.chunks, executor.passes(instructions)),
        ):
            tied = [(parameter, other) for parameter, other in self.tied if not parameter.frozen]
            for parameter, _ in tied:
                buckets.expect(parameter)
            for instruction in instructions:
                executor.execute(instruction)
            loss = executor.finish()
            for parameter, other in tied:
                self._sum_tied(parameter, other)
                buckets.count(parameter)
        return loss

    def forward(self, x: Any, ctx: Context, spec: ArraySpec) -> Any:
        """Return the output of the model on the last stage, and None on the other stages.

        Parameters
        ----------
        x : DistArray
            Input of the model, on the grid of the first stage. Other stages ignore it.
        ctx : Context
            Context of the forward pass.
        spec : tuple of (shape, Layout, dtype)
            Global shape, layout and dtype of the activation between chunks, as `StepData.activation_spec` returns
            them.

        Returns
        -------
        DistArray or None
            Output of the last chunk, on the grid of the last stage.

        Notes
        -----
        **Communication:** over ``pipe``: the activation once over each border between chunks, and one word.
        """
        data = ForwardOnly(x, ctx, spec)
        kinds = (Forward, ReceiveActivation, SendActivation)
        forwards = [step for step in self._program(1) if isinstance(step, kinds)]
        executor = StepExecutor(self, data, forwards)
        with self.prefetch.over(self.chunks, executor.passes(forwards)):
            for step in forwards:
                executor.execute(step)
            executor.finish()
        return data.output

    def outputs(self, x: Any, ctx: Context, spec: ArraySpec) -> Any:
        """Return the output of the model on all stages.

        Parameters
        ----------
        x : DistArray
            Input of the model, on the grid of the first stage. Other stages ignore it.
        ctx : Context
            Context of the forward pass.
        spec : tuple of (shape, Layout, dtype)
            Global shape, layout and dtype of the activation between chunks.

        Returns
        -------
        DistArray or tuple of DistArray
            Output of the last chunk, on the grid of each stage.

        Notes
        -----
        **Communication:** over ``pipe``: the activation once over each border between chunks, and a bcast of the
        output, whose block each rank of the other stages receives.
        """
        output = self.forward(x, ctx, spec)
        if self.stages == 1:
            return output
        last = self.stage == self.stages - 1
        arrays = list(output) if isinstance(output, tuple) else [output]
        own = [(a.shape, a.layout, str(backend.numpy_dtype(a.dtype))) for a in arrays] if last else None
        root = {axis: self.stages - 1 if axis == PIPE else 0 for axis in self.grid.axes}
        several, specs = comm.share((isinstance(output, tuple), own), self.grid, rank_of(root, self.grid.axes))
        spread = [self._bcast(one, arrays[i] if last else None) for i, one in enumerate(specs)]
        return tuple(spread) if several else spread[0]

    def _bcast(self, spec: ArraySpec, array: DistArray | None) -> DistArray:
        """Return an array of the last stage on this stage."""
        (shape, layout, dtype), own = spec, self.stage_grid
        box = layout.box(shape, own.axes, own.coords)
        block = own.empty(box_shape(box), dtype) if array is None else backend.contiguous(array.local)
        # Y on the last stage -> Y on all stages: bcast over pipe
        return DistArray(comm.bcast(block, self.grid, (PIPE,), self.stages - 1), shape, layout, own)

    def _sum_tied(self, parameter: Parameter, other: int) -> None:
        """Add the gradient that another stage has of a weight that both hold."""
        if not parameter.deferred:
            parameter.reduce()
        assert parameter.grad is not None
        layout = parameter.value.layout if parameter.deferred else parameter.owned
        here = parameter.grad.redistribute(layout.with_partial(*parameter.deferred))
        there = backend.empty_like(here.local, here.local.shape)
        # dW {U_pipe} of two stages -> dW on both: exchange of this rank's block over pipe, and a sum
        send = backend.contiguous(here.local)
        start_exchange(self.grid, (PIPE,), [(other, send)], [(other, there)]).wait()
        first, second = (here.local, there) if self.stage < other else (there, here.local)
        parameter.grad = here.like(first + second)  # in one order, so that both copies stay equal to the bit
