"""What the ranks of a job can do, measured within a second."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from colossal_mpi import comm
from colossal_mpi.apps.machine import measure_peak
from colossal_mpi.apps.planning.calibrate import NOTHING, calls, difference, memory, typical
from colossal_mpi.grid import Grid
from colossal_mpi.meta.machine import Link, Machine

_LARGE = 1 << 20
"""Elements of a message that takes the time of its bytes."""
_BETWEEN = 1 << 20
"""Elements of what is computed between two small messages."""
_TIMES = 10


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
    # All ranks measure together, whatever the size of their node; that of a largest node counts for all.
    links = comm.collect(_link(Grid(node, grid.device.partition(":")[0], node=node.size), grid), grid)
    near = links[sizes.index(max(sizes))]
    far = near if max(sizes) == grid.size else _link(grid, grid)
    node.Free()
    flops = (peak or measure_peak(grid, dtype)) / grid.size
    return Machine(flops, memory(grid), *calls(grid), near, far, max(sizes), grid.device != "cpu")


def _link(group: Grid, grid: Grid) -> Link:
    """Return how the ranks of a group, one of several that do the same, gather blocks of one another.

    Small ones come between computations, as in a program: ranks that share cores have to wait for one another's turn.
    """
    axes, ranks, xp = tuple(group.axes), group.size, group.xp
    x = xp.ones((_BETWEEN,), dtype=xp.float32)

    def gather(count: int) -> Callable[[], Any]:
        own = xp.ones((count,), dtype=xp.float32)
        return lambda: comm.allgather(own, group, axes, [count] * ranks)

    def between() -> Any:
        y = x * x
        small()
        return y

    small = gather(1)
    late = max(0.0, difference(grid, between, lambda: x * x, _TIMES))
    large = typical(grid, gather(_LARGE))
    return Link(late / math.ceil(math.log2(ranks)), 4 * _LARGE * (ranks - 1) / large) if ranks > 1 else NOTHING
