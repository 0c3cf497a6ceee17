"""Communication between the ranks of a grid: collectives, nonblocking messages, and reading of blocks on one node.

``redistribution``, ``linalg`` and ``layers`` call this package, which alone gives buffers to MPI and adds the terms of
reductions. It calls ``grid`` for the communicators and enters every transfer into the ``ledger``.
"""

from colossal_mpi.comm import check
from colossal_mpi.comm.check import checked
from colossal_mpi.comm.collectives import (
    MAX,
    SUM,
    add_in_rank_order,
    agreed,
    all_to_all,
    allgather,
    bcast,
    collect,
    collect_later,
    reduce_scatter,
    share,
)
from colossal_mpi.comm.messages import Pending, progress, reading, start_exchange
from colossal_mpi.comm.transport import (
    Announced,
    BlockingTransport,
    MessageTransport,
    Request,
    Started,
    Steps,
    Transport,
    allreduce,
    pieces_of,
)

__all__ = [
    "MAX",
    "SUM",
    "Announced",
    "BlockingTransport",
    "MessageTransport",
    "Pending",
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
    "check",
    "checked",
    "collect",
    "collect_later",
    "pieces_of",
    "progress",
    "reading",
    "reduce_scatter",
    "share",
    "start_exchange",
]
