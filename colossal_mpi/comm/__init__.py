"""Communication between the ranks of a grid: collectives, messages in flight, and reading on one node.

``redistribution``, ``linalg`` and ``layers`` call this package; it alone gives buffers to MPI. Every transfer goes
through ``staging``, which says how a block reaches MPI, and is entered into the ledger.
"""

from colossal_mpi.comm.collectives import (
    MAX,
    SUM,
    agreed,
    all_to_all,
    allgather,
    allreduce,
    bcast,
    cast,
    collect,
    collect_later,
    mpi_type,
    reduce_scatter,
    share,
    widened,
)

__all__ = [
    "MAX",
    "SUM",
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
