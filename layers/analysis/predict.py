"""What a training step takes, predicted for any grid by one process: the step itself, run on arrays without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from colossal_mpi import distarray, ledger, meta
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.analysis.memory import one_microbatch, saved_bytes
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.optim.adam import AdamW
from colossal_mpi.layers.optim.base import Optimizer
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


class TokenFeed:
    """Microbatches of token ids ``[b, s]`` and labels, all zeros, and their cross-entropy.

    Parameters
    ----------
    parallelism : Parallelism
    hidden : int
        Width of the residual stream.
    batch, length : int
        Samples of a step and tokens of each.
    microbatches : int
    dtype : str
        Of the residual stream.
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

    def _rows(self, microbatch: int) -> tuple[int, int]:
        return part(self.sizes[0], self.microbatches, microbatch)

    def _tokens(self, microbatch: int) -> DistArray:
        first, stop = self._rows(microbatch)
        p = self.parallelism
        return distarray.zeros((stop - first, self.sizes[1]), p.grid, p.tokens(), "int64")

    def context(self, microbatch: int) -> Context:
        """Return the number and the samples of a microbatch."""
        return Context(sample=self._rows(microbatch)[0])

    def inputs(self, microbatch: int) -> DistArray:
        """Return token ids."""
        return self._tokens(microbatch)

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        """Return the cross-entropy."""
        return self.cross_entropy.forward(y, self._tokens(microbatch), self.sizes[0] * self.sizes[1])

    def loss_backward(self, cache: Any) -> Any:
        """Return the cotangent of the logits."""
        return self.cross_entropy.backward(cache)

    def activation_spec(self, microbatch: int) -> ArraySpec:
        """Return shape, layout and dtype of the residual stream."""
        first, stop = self._rows(microbatch)
        return (stop - first, *self.sizes[1:]), self.parallelism.stream(), self.dtype


@dataclass(frozen=True)
class Prediction:
    """What one rank needs in a step; memory in bytes."""

    coords: Mapping[str, int]
    weights: int
    """As they are stored."""
    gradients: int
    """As they are held from one microbatch to the next."""
    state: int
    """Of the optimizer, masters included."""
    saved: int
    """What a microbatch keeps from its forward to its backward pass: activations, gathered operands, the loss's."""
    live: float
    """Most microbatches that the schedule keeps at once; of several chunks each is a part of one."""
    peak: int
    """Most of all that is alive at any moment of the step."""
    words: int
    """Array elements that the rank receives in the step."""
    flops: int
    """Of all products."""
    record: ledger.Record
    """All messages and computations of the step, in order; timed if the dry run has a clock."""
    seconds: float
    """Of the step, but for waits for other stages; 0 unless the dry run has a clock."""

    @property
    def activations(self) -> int:
        """Most that saved arrays take."""
        return round(self.saved * self.live)


def predict_memory(
    model: Callable[[Parallelism], Sequential],
    feed: Callable[[Parallelism], StepData],
    axes: Mapping[str, int],
    tensor: str | None = None,
    *,
    kinds: str | Sequence[str] = "none",
    schedule: str = "1f1b",
    chunks: int = 1,
    optimizer: Callable[[list[Parameter]], Optimizer] = AdamW,
    **modes: Any,
) -> list[Prediction]:
    """Return what a training step takes on the first rank of each stage, whose blocks are the largest.

    Nothing but the step itself is consulted: it is run on a meta grid, on which arrays have shapes and no memory.
    So any model and any grid will do, in one process.

    Parameters
    ----------
    model : callable
        Makes the model.
    feed : callable
        Makes what the step computes on, such as `TokenFeed`.
    axes : mapping of str to int
        Of the grid, ``pipe`` included.
    tensor : str, optional
        As `Parallelism` takes it.
    kinds
        As `recompute` takes them.
    schedule, chunks
        As `Pipeline` and `cut` take them.
    optimizer : callable
    **modes
        ``zero``, ``keep_gathered``, ``sequence``, as `Parallelism` takes them.

    Returns
    -------
    list of Prediction
        One for each coordinate of ``pipe``.

    Notes
    -----
    Experts are taken to be chosen equally often. What MPI takes itself is left out, and reductions that are under way
    longer than until the next layer may keep some of four buckets more.

    Examples
    --------
    >>> config = LlamaConfig(dtype="bfloat16")
    >>> predict_memory(lambda p: Llama(config, p), lambda p: TokenFeed(p, 4096, 64, 8192, 8, "bfloat16"),
    ...                {"pipe": 4, "data": 8, "col": 8}, "1d", zero=1, kinds="full")
    """
    found = []
    for grid in stages(axes):
        with dry_run() as tally:
            p = Parallelism(stage_grid(grid), tensor, **modes)
            whole = recompute(model(p), kinds, SCHEDULES[schedule].defers_weights)
            names = parameter_names(whole, grid, chunks)
            pipeline = Pipeline(partition(whole, grid, chunks), grid, schedule, names=names)
            mine, data = optimizer(pipeline.parameters()), feed(p)
            found.append(predicted(pipeline, mine, data, tally, partial(_step, pipeline, mine, data)))
    return found


def _step(pipeline: Pipeline, optimizer: Optimizer, feed: StepData) -> None:
    pipeline.step(feed)
    optimizer.step()


def stages(axes: Mapping[str, int]) -> Iterator[Grid]:
    """Yield meta grids of the first rank of each stage, whose blocks are the largest."""
    for stage in range(axes.get(PIPE, 1)):
        coords = {axis: stage if axis == PIPE else 0 for axis in axes}
        yield Grid.meta(rank_of(coords, axes), **axes)


@contextmanager
def dry_run(clock: Clock | None = None) -> Iterator[meta.Tally]:
    """Count what is done on meta grids until the block ends; a clock times it, and the ledger."""
    with (
        meta.tally(clock) as tally,
        nullcontext() if clock is None else ledger.timed_by(clock),
    ):
        yield tally


def predicted(
    pipeline: Pipeline, optimizer: Optimizer, feed: StepData, tally: meta.Tally, step: Callable[[], Any]
) -> Prediction:
    """Return what a step takes of a stage on a meta grid that was made, and its optimizer with it, in a dry run."""
    weights = [q.value for q in optimizer.parameters]
    state = tally.now - saved_bytes(weights)
    saved, gradients = one_microbatch(pipeline, feed)
    tally.peak, tally.flops = tally.now, 0
    begun = ledger.clock.now()
    with ledger.record() as moved:
        step()
    return Prediction(
        dict(pipeline.grid.coords),
        saved_bytes(weights),
        gradients,
        state,
        saved,
        _live(pipeline, feed.microbatches),
        tally.peak,
        moved.words,
        tally.flops,
        moved,
        0.0 if tally.clock is None else tally.clock.now() - begun,
    )


def _live(pipeline: Pipeline, microbatches: int) -> float:
    """Return the most microbatches whose caches a stage holds at once; a piece of one counts as its part."""
    chunks, stages = len(pipeline.chunks), range(pipeline.stages)
    programs = [list(program(pipeline.schedule, pipeline.stages, microbatches, i, chunks)) for i in stages]
    return verify(programs).live[pipeline.stage] / chunks
