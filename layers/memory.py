"""What a training step takes, predicted for any grid by one process: the step itself, run on arrays without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colossal_mpi import distarray, ghost, ledger
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers import kernels
from colossal_mpi.layers.chain import Chain
from colossal_mpi.layers.layer import Context
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.optim.adam import AdamW
from colossal_mpi.layers.optim.base import Optimizer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.pipeline import PIPE, Pipeline, cut, pieces, place_of
from colossal_mpi.layers.recompute import recompute
from colossal_mpi.layers.schedule import program
from colossal_mpi.layers.simulate import check
from colossal_mpi.layers.stage import Feed, Stream
from colossal_mpi.layout import part, rank_of


def buffers(item: Any) -> Iterator[Any]:
    """Yield the memory behind all arrays of a cache or another nest of tuples, lists and arrays, each once.

    Of a NumPy array it is the array that owns it, of one without memory its `ghost.Memory`; both have `nbytes`.
    """
    found: dict[int, Any] = {}
    _visit(item, found)
    yield from found.values()


def _visit(item: Any, found: dict[int, Any]) -> None:
    if isinstance(item, tuple | list):
        for member in item:
            _visit(member, found)
    elif isinstance(item, DistArray):
        _visit(item.local, found)
    elif isinstance(item, Context):
        _visit([item.mask, item.positions, item.segments], found)
    elif isinstance(item, ghost.Ghost):
        found[id(item.memory)] = item.memory
    elif hasattr(item, "nbytes") and hasattr(item, "shape"):
        while hasattr(getattr(item, "base", None), "nbytes"):
            item = item.base
        found[id(item)] = item


def saved_bytes(cache: Any, besides: Sequence[Any] = ()) -> int:
    """Return the bytes that a cache keeps alive, but for memory that is behind other arrays, such as weights."""
    others = {id(memory) for memory in buffers(list(besides))}
    return sum(memory.nbytes for memory in buffers(cache) if id(memory) not in others)


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
        return Context(microbatch=microbatch, sample=self._rows(microbatch)[0])

    def inputs(self, microbatch: int) -> DistArray:
        """Return token ids."""
        return self._tokens(microbatch)

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        """Return the cross-entropy."""
        return self.cross_entropy.forward(y, self._tokens(microbatch), self.sizes[0] * self.sizes[1])

    def loss_backward(self, cache: Any) -> Any:
        """Return the cotangent of the logits."""
        return self.cross_entropy.backward(cache)

    def stream(self, microbatch: int) -> Stream:
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

    @property
    def activations(self) -> int:
        """Most that saved arrays take."""
        return round(self.saved * self.live)


def predict_memory(
    model: Callable[[Parallelism], Chain],
    feed: Callable[[Parallelism], Feed],
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

    Nothing but the step itself is consulted: it is run on a planned grid, on which arrays have shapes and no memory.
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
    Experts are taken to be chosen equally often. Tiles of attention, a megabyte or so, are left out of the peak, as is
    what MPI takes itself.

    Examples
    --------
    >>> config = LlamaConfig(dtype="bfloat16")
    >>> predict_memory(lambda p: Llama(config, p), lambda p: TokenFeed(p, 4096, 64, 8192, 8, "bfloat16"),
    ...                {"pipe": 4, "data": 8, "col": 8}, "1d", zero=1, kinds="full")
    """
    found = []
    for stage in range(axes.get(PIPE, 1)):
        coords = {axis: stage if axis == PIPE else 0 for axis in axes}
        grid = Grid.planned(rank_of(coords, axes), **axes)
        p = Parallelism(place_of(grid), tensor, **modes)
        with kernels.as_planned(), ghost.tally() as tally:
            whole = recompute(model(p), kinds, schedule == "zero-bubble")
            held = [
                sorted({q.name for piece in some for layer in piece for q in layer.parameters()})
                for some in pieces(whole, axes.get(PIPE, 1), chunks)
            ]
            pipeline = Pipeline(cut(whole, grid, chunks), grid, schedule, held=held)
            found.append(_predict(pipeline, optimizer(pipeline.parameters()), feed(p), tally))
    return found


def _predict(pipeline: Pipeline, optimizer: Optimizer, feed: Feed, tally: ghost.Tally) -> Prediction:
    """Return what a step takes of a stage that is made, and whose optimizer is."""
    weights = [q.value for q in optimizer.parameters]
    state = tally.now - saved_bytes(weights)
    saved, gradients = one_microbatch(pipeline, feed)
    tally.peak, tally.flops = tally.now, 0
    with ledger.record() as moved:
        pipeline.step(feed)
        optimizer.step()
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
    )


def _live(pipeline: Pipeline, microbatches: int) -> float:
    """Return the most microbatches whose caches a stage holds at once; a piece of one counts as its part."""
    chunks, stages = len(pipeline.chunks), range(pipeline.stages)
    programs = [list(program(pipeline.schedule, pipeline.stages, microbatches, i, chunks)) for i in stages]
    return check(programs).live[pipeline.number] / chunks


def one_microbatch(pipeline: Pipeline, feed: Feed) -> tuple[int, int]:
    """Return the bytes that the first microbatch keeps between its passes, and those of the gradients after them.

    All chunks of this stage go forward and back together, on zeros in the place of what other stages would send. On a
    live grid all ranks must do so.
    """
    shape, layout, dtype = feed.stream(0)
    parameters, caches = pipeline.parameters(), []
    last = pipeline.number == pipeline.stages - 1
    for c, chunk in enumerate(pipeline.chunks):
        x = feed.inputs(0) if c == pipeline.number == 0 else distarray.zeros(shape, pipeline.place, layout, dtype)
        y, cache = chunk.forward(x, feed.context(0))
        ends = last and c == len(pipeline.chunks) - 1
        caches.append((cache, feed.loss(y, 0)[1] if ends else None))
    saved = saved_bytes(caches, [q.value for q in parameters])
    while caches:
        cache, loss = caches.pop()
        dy = distarray.zeros(shape, pipeline.place, layout, dtype) if loss is None else feed.loss_backward(loss)
        pipeline.chunks[len(caches)].backward(dy, cache)
    gradients = saved_bytes([q.grad for q in parameters if q.grad is not None])
    for q in parameters:
        q.grad = None
    return saved, gradients
