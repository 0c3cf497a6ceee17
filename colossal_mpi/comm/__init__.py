"""Communication between the ranks of a grid: collectives, messages in flight, and reading on one node.

``redistribution``, ``linalg`` and ``layers`` call this package; it alone gives buffers to MPI. Every transfer goes
through ``staging``, which says how a block reaches MPI, and is entered into the ledger.
"""

from colossal_mpi.comm.collectives import (
    MAX,
    SUM,
    add_in_rank_order,
    agreed,
    all_to_all,
    allgather,
    bcast,
    cast,
    collect,
    collect_later,
    mpi_type,
    reduce_scatter,
    share,
    widened,
)
from colossal_mpi.comm.transport import Blocking, Messages, Request, Started, Steps, Transport, allreduce

__all__ = [
    "MAX",
    "SUM",
    "Blocking",
    "Messages",
    "Request",
    "Started",
    "Steps",
    "Transport",
    "add_in_rank_order",
    "agreed",
    "all_to_all",
    "allgather",
    "allreduce",
    "bcast",
    "cast",
    "collect",
    "collect_later",
    "mpi_type",
    "reduce_scatter",
    "share",
    "widened",
]
