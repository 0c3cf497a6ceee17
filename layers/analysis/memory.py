"""The memory that is behind arrays, caches and gradients, of live and of meta grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from colossal_mpi import distarray, meta
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.pipeline import Pipeline, StepData


def buffers(item: Any) -> Iterator[Any]:
    """Yield the memory behind all arrays of a cache or another nest of tuples, lists and arrays, each once.

    Of a NumPy array it is the array that owns it, of one without memory its `meta.Memory`; both have `nbytes`.
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
    elif isinstance(item, meta.MetaArray):
        found[id(item.memory)] = item.memory
    elif hasattr(item, "nbytes") and hasattr(item, "shape"):
        while hasattr(getattr(item, "base", None), "nbytes"):
            item = item.base
        found[id(item)] = item


def saved_bytes(cache: Any, besides: Sequence[Any] = ()) -> int:
    """Return the bytes that a cache keeps alive, but for memory that is behind other arrays, such as weights."""
    others = {id(memory) for memory in buffers(list(besides))}
    return sum(memory.nbytes for memory in buffers(cache) if id(memory) not in others)


def one_microbatch(pipeline: Pipeline, feed: StepData) -> tuple[int, int]:
    """Return the bytes that the first microbatch keeps between its passes, and those of the gradients after them.

    All chunks of this stage go forward and back together, on zeros in the place of what other stages would send. On a
    live grid all ranks must do so.
    """
    shape, layout, dtype = feed.activation_spec(0)
    parameters, caches = pipeline.parameters(), []
    last = pipeline.stage == pipeline.stages - 1
    for c, chunk in enumerate(pipeline.chunks):
        x = feed.inputs(0) if c == pipeline.stage == 0 else distarray.zeros(shape, pipeline.stage_grid, layout, dtype)
        y, cache = chunk.forward(x, feed.context(0))
        ends = last and c == len(pipeline.chunks) - 1
        caches.append((cache, feed.loss(y, 0)[1] if ends else None))
    saved = saved_bytes(caches, [q.value for q in parameters])
    while caches:
        cache, loss = caches.pop()
        dy = distarray.zeros(shape, pipeline.stage_grid, layout, dtype) if loss is None else feed.loss_backward(loss)
        pipeline.chunks[len(caches)].backward(dy, cache)
    gradients = saved_bytes([q.grad for q in parameters if q.grad is not None])
    for q in parameters:
        q.grad = None
    return saved, gradients
