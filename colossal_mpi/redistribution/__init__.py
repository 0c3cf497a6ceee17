"""Redistributions between layouts: plans of boxes and sums, and their blocking or nonblocking execution.

Distributed arrays (`colossal_mpi.distarray`) and the products of linalg call it, with a rank's block, the global shape,
the layouts and the grid. It calls `colossal_mpi.comm` to move the elements that a rank lacks.
"""

from colossal_mpi.redistribution.execute import plan_of, readable, redistribute, reduce, start
from colossal_mpi.redistribution.gather import gather_to_root
from colossal_mpi.redistribution.indexing import select
from colossal_mpi.redistribution.plan import (
    Plan,
    Reduction,
    cotangent,
    group_coords,
    moved_axes,
    plan_reduce_scatter,
    received,
    stages,
)

__all__ = [
    "Plan",
    "Reduction",
    "cotangent",
    "gather_to_root",
    "group_coords",
    "moved_axes",
    "plan_of",
    "plan_reduce_scatter",
    "readable",
    "received",
    "redistribute",
    "reduce",
    "select",
    "stages",
    "start",
]
