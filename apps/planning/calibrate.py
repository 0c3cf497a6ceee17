"""What operations on arrays take here besides arithmetic and memory: small programs, run and counted by dry runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from mpi4py import MPI

from colossal_mpi import comm, distarray
from colossal_mpi.grid import Grid
from colossal_mpi.layers import GELU, AdamW, Context, Layer, LayerNorm, Parallelism, Sequential
from colossal_mpi.layers.analysis.predict import dry_run
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layout import Layout
from colossal_mpi.meta.machine import Clock, Link, Machine
from colossal_mpi.platform import backend

_ROUNDS = 5
_TINY = GPTConfig(vocabulary=8, layers=2, hidden=8, heads=2, positions=8)
_TALL, _WIDE = 2048, 512
"""Of an array whose passes take the time of its bytes."""
NOTHING = Link(0.0, math.inf)
_CALLS = Machine(math.inf, math.inf, 1.0, 0.0, NOTHING, NOTHING, 1)
_PRODUCTS = Machine(math.inf, math.inf, 0.0, 1.0, NOTHING, NOTHING, 1)
_BYTES = Machine(math.inf, 1.0, 0.0, 0.0, NOTHING, NOTHING, 1)
"""Machines on which nothing takes time but an operation on an array, a product, or a byte of an array: a second."""

Program = Callable[[Parallelism], Callable[[], Any]]
"""Makes something that can be done again and again."""


def typical(grid: Grid, action: Callable[[], Any], times: int = 1) -> float:
    """Return the seconds of an action that all ranks do at once: the slowest rank's, the median of some rounds."""
    action()
    return median(_round(grid, action, times) for _ in range(_ROUNDS))


def difference(grid: Grid, action: Callable[[], Any], other: Callable[[], Any], times: int) -> float:
    """Return by how many seconds an action takes longer than another, both taking turns; the median of some rounds."""
    action()
    other()
    return median(_round(grid, action, times) - _round(grid, other, times) for _ in range(2 * _ROUNDS + 1))


def _round(grid: Grid, action: Callable[[], Any], times: int) -> float:
    comm.collect(None, grid)
    begun = time.perf_counter()
    for _ in range(times):
        last = action()
    backend.synchronize(last)
    return max(comm.collect((time.perf_counter() - begun) / times, grid))


def calls(grid: Grid) -> tuple[float, float]:
    """Return the seconds that an operation on an array takes besides, and those that a product does.

    The first are those of the update of a model too small to take any other time, the second what is left of its
    passes.
    """
    alone = Parallelism(Grid(MPI.COMM_SELF, grid.device.partition(":")[0]))
    passes, step = _passes_of_tiny(alone), _step_of_tiny(alone)
    counts = {program: count(program, _CALLS) for program in (_passes_of_tiny, _step_of_tiny)}
    call = max(0.0, difference(grid, step, passes, 2)) / (counts[_step_of_tiny] - counts[_passes_of_tiny])
    left = typical(grid, passes, 2) - counts[_passes_of_tiny] * call
    return call, max(0.0, left) / count(_passes_of_tiny, _PRODUCTS)


def memory(grid: Grid) -> float:
    """Return the bytes a second that elementwise operations read and write."""
    alone = Parallelism(Grid(MPI.COMM_SELF, grid.device.partition(":")[0]))
    return count(_elementwise, _BYTES) / typical(grid, _elementwise(alone))


def count(program: Program, unit: Machine) -> float:
    """Return the seconds that a program would take on a machine."""
    with dry_run(Clock(unit, {}, {})) as tally:
        assert tally.clock is not None
        once = program(Parallelism(Grid.meta()))
        once()  # the weights are made
        before = tally.clock.now()
        once()
        return tally.clock.now() - before


def _passes(layer: Layer, p: Parallelism, shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    x = distarray.zeros(shape, p.grid, Layout(*[None] * len(shape)), dtype)

    def passes() -> Any:
        y, cache = layer.forward(x, Context())
        layer.backward(y, cache)
        return y.local

    return passes


def _passes_of_tiny(p: Parallelism) -> Callable[[], Any]:
    return _passes(GPT(_TINY, p), p, (1, _TINY.positions), "int64")


def _step_of_tiny(p: Parallelism) -> Callable[[], Any]:
    model = GPT(_TINY, p)
    passes, optimizer = _passes(model, p, (1, _TINY.positions), "int64"), AdamW(model.parameters())

    def step() -> Any:
        last = passes()
        optimizer.step()
        return last

    return step


def _elementwise(p: Parallelism) -> Callable[[], Any]:
    return _passes(Sequential(LayerNorm(_WIDE, p, "norm"), GELU()), p, (_TALL, _WIDE), "float32")
