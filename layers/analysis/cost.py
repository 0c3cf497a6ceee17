"""The cost of a training step on one rank of any grid: memory, words, flop and time, by a dry run in one process.

A dry run does the step itself on a meta grid, whose arrays have no memory and whose other ranks do not exist. Users
call `step_costs` for a model; ``apps.planning`` calls `dry_run` and `cost_of_step` for a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from colossal_mpi import distarray, ledger, meta
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.analysis.memory import microbatch_bytes, saved_bytes
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.optim import AdamW, Optimizer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.pipeline import (
    PIPE,
    SCHEDULES,
    ArraySpec,
    Pipeline,
    StepData,
    parameter_names,
    partition,
    program,
    stage_grid,
    verify,
)
from colossal_mpi.layers.recompute import recompute
from colossal_mpi.layout import part, rank_of
from colossal_mpi.machine import Clock


class TokenData(StepData):
    """The data of a training step of a language model, with zeros for token ids and labels, and its cross-entropy.

    Parameters
    ----------
    parallelism : Parallelism
        The modes of the model, and the grid of its stage.
    hidden : int
        Width of the residual stream.
    batch : int
        Samples of a step, over all ranks and microbatches.
    length : int
        Tokens of a sample.
    microbatches : int
        Number of microbatches of the step.
    dtype : str
        Dtype of the residual stream.
    """

    def __init__(
        self,
        parallelism: Parallelism,
        hidden: int,
        batch: int,
        length: int,
        microbatches: int = 1,
        dtype: str = "float32",
    ) -> None:
        self.parallelism, self.sizes, self.dtype = parallelism, (batch, length, hidden), dtype
        self.microbatches, self.cross_entropy = microbatches, CrossEntropy(parallelism)

    def _samples(self, microbatch: int) -> tuple[int, int]:
        """Return the first sample of a microbatch, and the one after its last."""
        return part(self.sizes[0], self.microbatches, microbatch)

    def _tokens(self, microbatch: int) -> DistArray:
        first, stop = self._samples(microbatch)
        p = self.parallelism
        return distarray.zeros((stop - first, self.sizes[1]), p.grid, p.tokens(), "int64")

    def context(self, microbatch: int) -> Context:
        return Context(sample=self._samples(microbatch)[0])

    def inputs(self, microbatch: int) -> DistArray:
        return self._tokens(microbatch)

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        return self.cross_entropy.forward(y, self._tokens(microbatch), self.sizes[0] * self.sizes[1])

    def loss_backward(self, cache: Any) -> Any:
        return self.cross_entropy.backward(cache)

    def activation_spec(self, microbatch: int) -> ArraySpec:
        first, stop = self._samples(microbatch)
        return (stop - first, *self.sizes[1:]), self.parallelism.stream(), self.dtype


@dataclass(frozen=True)
class StepCost:
    """The cost of a training step on one rank.

    Parameters
    ----------
    coords : mapping of str to int
        The coordinates of the rank.
    weights : int
        Bytes of the stored weights.
    gradients : int
        Bytes of the gradients that are held from one microbatch to the next.
    state : int
        Bytes of the state of the optimizer, with master weights.
    saved : int
        Bytes that a microbatch keeps from its forward to its backward pass: activations, gathered operands, and what
        the loss keeps.
    live : float
        The most microbatches that the schedule keeps at once. With several chunks, each chunk counts as its share.
    peak : int
        The most bytes that are alive at any moment of the step.
    words : int
        Array elements that the rank receives.
    flops : int
        Flop of all products of the rank.
    record : ledger.Record
        All messages and computations of the step in order, with their times if the dry run has a clock.
    seconds : float
        Seconds of the step without waits for other stages; 0 unless the dry run has a clock.
    """

    coords: Mapping[str, int]
    weights: int
    gradients: int
    state: int
    saved: int
    live: float
    peak: int
    words: int
    flops: int
    record: ledger.Record
    seconds: float

    @property
    def activations(self) -> int:
        """The most bytes that saved arrays take at once."""
        return round(self.saved * self.live)


def step_costs(
    model: Callable[[Parallelism], Sequential],
    data: Callable[[Parallelism], StepData],
    axes: Mapping[str, int],
    tensor: str | None = None,
    *,
    kinds: str | Sequence[str] = "none",
    schedule: str = "1f1b",
    chunks: int = 1,
    optimizer: Callable[[list[Parameter]], Optimizer] = AdamW,
    **modes: Any,
) -> list[StepCost]:
    """Return the cost of a training step on the first rank of each pipeline stage, whose blocks are the largest.

    One process runs the step on a meta grid. Any model and any grid will do.

    Parameters
    ----------
    model : callable
        Makes the model.
    data : callable
        Makes the data of the step, such as `TokenData`.
    axes : mapping of str to int
        The axes of the grid and their sizes, outermost first, with ``pipe`` for the stages.
    tensor : str, optional
        The tensor mode, as `Parallelism` takes it.
    kinds : str or sequence of str
        The kinds of layers that are recomputed, as `recompute` takes them.
    schedule : str
        The schedule of the pipeline.
    chunks : int
        Chunks of each stage.
    optimizer : callable
        Makes the optimizer of a list of parameters.
    **modes
        ``zero``, ``keep_gathered`` and ``sequence``, as `Parallelism` takes them.

    Returns
    -------
    list of StepCost
        One for each coordinate of ``pipe``.

    Raises
    ------
    ColossalError
        The error that the step itself would raise, if the model cannot be on that grid.

    Notes
    -----
    The dry run assumes that experts are chosen equally often. It leaves out the memory of MPI itself, and up to four
    more buckets that stay alive where reductions take longer than the next layer.

    Examples
    --------
    >>> config = LlamaConfig(dtype="bfloat16")
    >>> step_costs(lambda p: Llama(config, p), lambda p: TokenData(p, 4096, 64, 8192, 8, "bfloat16"),
    ...            {"pipe": 4, "data": 8, "col": 8}, "1d", zero=1, kinds="full")
    """
    costs = []
    for grid in stage_grids(axes):
        with dry_run() as tally:
            p = Parallelism(stage_grid(grid), tensor, **modes)
            whole = recompute(model(p), kinds, SCHEDULES[schedule].defers_weights)
            names = parameter_names(whole, grid, chunks)
            pipeline = Pipeline(partition(whole, grid, chunks), grid, schedule, names=names)
            updater, batches = optimizer(pipeline.parameters()), data(p)
            costs.append(cost_of_step(pipeline, updater, batches, tally, partial(_step, pipeline, updater, batches)))
    return costs


def _step(pipeline: Pipeline, optimizer: Optimizer, data: StepData) -> None:
    pipeline.step(data)
    optimizer.step()


def stage_grids(axes: Mapping[str, int]) -> Iterator[Grid]:
    """Yield a meta grid for the first rank of each pipeline stage, whose blocks are the largest.

    Parameters
    ----------
    axes : mapping of str to int
        The axes of the grid and their sizes, outermost first, with ``pipe`` for the stages.

    Yields
    ------
    Grid
        The whole grid as that rank sees it.
    """
    for stage in range(axes.get(PIPE, 1)):
        coords = {axis: stage if axis == PIPE else 0 for axis in axes}
        yield Grid.meta(rank_of(coords, axes), **axes)


@contextmanager
def dry_run(clock: Clock | None = None) -> Iterator[meta.Tally]:
    """Count the arrays and products of meta grids until the block ends.

    Parameters
    ----------
    clock : Clock, optional
        A clock of a machine. Operations and messages move it forward, and the ledger takes its times from it.

    Yields
    ------
    Tally
        Bytes and flop, which grow while the block runs.
    """
    with meta.tally(clock) as tally, nullcontext() if clock is None else ledger.timed_by(clock):
        yield tally


def cost_of_step(
    pipeline: Pipeline, optimizer: Optimizer, data: StepData, tally: meta.Tally, step: Callable[[], object]
) -> StepCost:
    """Return the cost of a step of a pipeline stage, which was made inside the dry run that is still going on.

    Parameters
    ----------
    pipeline : Pipeline
        The stage, on a meta grid.
    optimizer : Optimizer
        Its optimizer.
    data : StepData
        The data of the step.
    tally : Tally
        The tally of the dry run.
    step : callable
        Does the step.

    Returns
    -------
    StepCost
        The cost on the rank of the pipeline's grid.
    """
    weights = [q.value for q in pipeline.parameters()]
    state = tally.now - saved_bytes(weights)
    saved, gradients = microbatch_bytes(pipeline, data)
    tally.peak, tally.flops = tally.now, 0
    begun = ledger.clock.now()
    with ledger.record() as record:
        step()
    return StepCost(
        coords=dict(pipeline.grid.coords),
        weights=saved_bytes(weights),
        gradients=gradients,
        state=state,
        saved=saved,
        live=_live(pipeline, data.microbatches),
        peak=tally.peak,
        words=record.words,
        flops=tally.flops,
        record=record,
        seconds=0.0 if tally.clock is None else tally.clock.now() - begun,
    )


def _live(pipeline: Pipeline, microbatches: int) -> float:
    """Return the greatest number of microbatches whose caches a stage holds at once; a chunk counts as its share."""
    chunks, stages = len(pipeline.chunks), range(pipeline.stages)
    programs = [list(program(pipeline.schedule, pipeline.stages, microbatches, i, chunks)) for i in stages]
    return verify(programs).live[pipeline.stage] / chunks
