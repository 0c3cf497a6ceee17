"""What the ranks of a job can do, measured within a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from mpi4py import MPI

from colossal_mpi import backend, comm, distarray
from colossal_mpi.apps.machine import measure_peak
from colossal_mpi.grid import Grid
from colossal_mpi.layers import GELU, Chain, Context, Layer, LayerNorm, Parallelism
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.predict import dry_run
from colossal_mpi.layout import Layout
from colossal_mpi.machine import Clock, Link, Machine

_ROUNDS = 5
_LARGE = 1 << 20
"""Elements of arrays and messages that take the time of their bytes."""
_TINY = GPTConfig(vocabulary=8, layers=2, hidden=8, heads=2, positions=8)
_NOTHING = Link(0.0, math.inf)
_WIDTH = 512
_PRODUCTS = Machine(math.inf, math.inf, 0.0, 1.0, _NOTHING, _NOTHING, 1)
_BYTES = Machine(math.inf, 1.0, 0.0, 0.0, _NOTHING, _NOTHING, 1)
"""On which nothing takes time but a product, or a byte of an array: a second."""


def measure(grid: Grid, dtype: str, peak: float = 0.0) -> Machine:
    """Return what each rank of a grid can do while all do the same.

    Parameters
    ----------
    grid : Grid
    dtype : str
        Of the products.
    peak : float
        flop/s of all ranks in products; 0 measures them.

    **Communication:** some messages of a few megabytes, and gathers of numbers.
    """
    world = grid.comm(tuple(grid.axes))
    node: Any = world.Split_type(MPI.COMM_TYPE_SHARED)
    sizes = comm.collect(node.size, grid)
    near = _link(Grid(node, grid.device.partition(":")[0], node=node.size), grid)
    far = near if node.size == grid.size else _link(grid, grid)
    few = grid.xp.ones((8,), dtype=grid.xp.float32)
    call = _typical(grid, lambda: few + few, 100)
    product = _per_unit(grid, _PRODUCTS, lambda p: GPT(_TINY, p), (1, _TINY.positions), "int64")
    memory = 1 / _per_unit(grid, _BYTES, _elementwise, (_LARGE // _WIDTH, _WIDTH), "float32")
    node.Free()
    return Machine(
        (peak or measure_peak(grid, dtype)) / grid.size,
        memory,
        call,
        product,
        near,
        far,
        max(sizes),
        grid.device != "cpu",
    )


def _elementwise(p: Parallelism) -> Layer:
    return Chain(LayerNorm(_WIDTH, p, "norm"), GELU())


def _typical(grid: Grid, action: Callable[[], Any], times: int = 1) -> float:
    """Return the seconds of an action that all ranks do at once: the slowest rank's, the median of some rounds."""
    action()
    taken = []
    for _ in range(_ROUNDS):
        comm.collect(None, grid)
        begun = time.perf_counter()
        for _ in range(times):
            last = action()
        backend.synchronize(last)
        taken.append(max(comm.collect((time.perf_counter() - begun) / times, grid)))
    return median(taken)


def _passes(p: Parallelism, model: Callable[[Parallelism], Layer], shape: tuple[int, ...], dtype: str) -> Any:
    """Return a function that goes forward and backward through a model, on zeros."""
    layer, x = model(p), distarray.zeros(shape, p.grid, Layout(*[None] * len(shape)), dtype)

    def passes() -> Any:
        y, cache = layer.forward(x, Context())
        layer.backward(y, cache)
        return y.local

    return passes


def _per_unit(
    grid: Grid, unit: Machine, model: Callable[[Parallelism], Layer], shape: tuple[int, ...], dtype: str
) -> float:
    """Return the seconds that forward and backward take of a model, for each second that they would take on `unit`."""
    with dry_run(Clock(unit, {}, {})) as tally:
        assert tally.clock is not None
        once = _passes(Parallelism(Grid.planned()), model, shape, dtype)
        once()  # the weights are made
        before = tally.clock.now()
        once()
        count = tally.clock.now() - before
    alone = Grid(MPI.COMM_SELF, grid.device.partition(":")[0])
    return _typical(grid, _passes(Parallelism(alone), model, shape, dtype)) / count


def _link(group: Grid, grid: Grid) -> Link:
    """Return how the ranks of a group, one of several that do the same, gather blocks of one another."""
    if group.size == 1:
        return _NOTHING
    axes, ranks = tuple(group.axes), group.size

    def gather(count: int) -> Callable[[], Any]:
        own = group.xp.ones((count,), dtype=group.xp.float32)
        return lambda: comm.allgather(own, group, axes, [count] * ranks)

    small, large = _typical(grid, gather(1), 20), _typical(grid, gather(_LARGE))
    return Link(small / math.ceil(math.log2(ranks)), 4 * _LARGE * (ranks - 1) / max(large - small, 1e-9))
