"""The model of a machine, and its measurement: rates of products and memory, overheads, links between ranks.

``linalg`` prices products with it, dry runs of ``layers.analysis`` and ``apps.planning`` take their times from its
clock, and training runs and the doctor report its measurements. `measure` calls ``comm``, ``grid`` and the gemm of
``platform``.
"""

from colossal_mpi.machine.measure import (
    measure,
    measure_allreduce,
    measure_flops,
    measure_pair,
    median_difference,
    median_seconds,
)
from colossal_mpi.machine.model import FREE_LINK, TYPICAL, Clock, Link, Machine

__all__ = [
    "FREE_LINK",
    "TYPICAL",
    "Clock",
    "Link",
    "Machine",
    "measure",
    "measure_allreduce",
    "measure_flops",
    "measure_pair",
    "median_difference",
    "median_seconds",
]
