"""Functions that measure the memory behind arrays, caches and gradients, on real and on meta grids.

``layers.analysis.cost`` measures a dry run with them, and the tests compare the result with a real step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from colossal_mpi import distarray, meta
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.pipeline import Pipeline, StepData


def buffers(item: Any) -> Iterator[Any]:
    """Yield the memory behind all arrays of a cache or of nested tuples and lists, each once.

    For a NumPy array this is the array that owns the memory, for a meta array it is its `meta.Memory`. Both have
    `nbytes`.
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


def saved_bytes(cache: Any, without: Sequence[Any] = ()) -> int:
    """Return the bytes that a cache keeps alive, without the memory behind other arrays, such as weights."""
    others = {id(memory) for memory in buffers(list(without))}
    return sum(memory.nbytes for memory in buffers(cache) if id(memory) not in others)


def microbatch_bytes(pipeline: Pipeline, data: StepData) -> tuple[int, int]:
    """Return the bytes that the first microbatch keeps between its passes, and the bytes of the gradients after them.

    All chunks of this stage do their forward passes and then their backward passes, on zeros in place of the arrays
    that other stages would send. On a real grid all ranks must call it.
    """
    shape, layout, dtype = data.activation_spec(0)
    parameters, caches = pipeline.parameters(), []
    last = pipeline.stage == pipeline.stages - 1
    for c, chunk in enumerate(pipeline.chunks):
        x = data.inputs(0) if c == pipeline.stage == 0 else distarray.zeros(shape, pipeline.stage_grid, layout, dtype)
        y, cache = chunk.forward(x, data.context(0))
        ends = last and c == len(pipeline.chunks) - 1
        caches.append((cache, data.loss(y, 0)[1] if ends else None))
    saved = saved_bytes(caches, [q.value for q in parameters])
    while caches:
        cache, loss = caches.pop()
        dy = distarray.zeros(shape, pipeline.stage_grid, layout, dtype) if loss is None else data.loss_backward(loss)
        pipeline.chunks[len(caches)].backward(dy, cache)
    gradients = saved_bytes([q.grad for q in parameters if q.grad is not None])
    for q in parameters:
        q.grad = None
    return saved, gradients
