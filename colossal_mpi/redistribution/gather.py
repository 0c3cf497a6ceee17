"""Bring an array to rank 0 a piece of bounded size at a time, for files that one rank writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.layout import Box, box_shape, slices
from colossal_mpi.platform import backend

PIECE = 1 << 22
"""Elements that are sent to rank 0 at once, at most, unless one index of the first dim has more."""


def to_root(array: DistArray, put: Callable[[Box, np.ndarray], None]) -> Exception | None:
    """Call ``put(box, values)`` on rank 0 for boxes of global indices that tile the array; return what it raised.

    Once `put` has failed, rank 0 goes on receiving and drops what comes, so that no rank is left waiting. It returns
    the failure, the other ranks None: `comm.agreed` makes an error of all ranks of it.

    Parameters
    ----------
    array : DistArray
        Without partial sums.
    put : callable
        Called on rank 0 alone, with a NumPy array.

    Notes
    -----
    **Communication:** rank 0 receives every element that it does not hold, once, in pieces of at most 32 MiB of
    float64: n less its own block.
    """
    failure: Exception | None = None
    for rank in range(array.grid.size):
        box = array.layout.owned(array.shape, array.grid.axes, array.grid.coords_of(rank))
        for piece in _pieces(box) if box is not None else ():
            came = _to_root(array, rank, piece)
            if came is not None and failure is None:
                try:
                    put(piece, came)
                except Exception as problem:
                    failure = problem
    return failure


def _pieces(box: Box) -> Iterator[Box]:
    """Yield boxes of whole rows that tile a box, of some `PIECE` elements each."""
    if not box:
        yield box
        return
    (start, stop), *rest = box
    rows = max(1, PIECE // max(1, math.prod(box_shape(tuple(rest)))))
    for low in range(start, stop, rows):
        yield ((low, min(low + rows, stop)), *rest)


def _to_root(array: DistArray, rank: int, piece: Box) -> np.ndarray | None:
    """Return on rank 0 the piece that `rank` holds."""
    grid, count = array.grid, math.prod(box_shape(piece))
    mine = grid.rank == rank
    block = array.local[slices(piece, array.box)] if mine else array.local
    flat = backend.namespace(block).reshape(block, (-1,))[: count if mine else 0]
    if rank:
        send, recv = [0] * grid.size, [0] * grid.size
        send[0], recv[rank] = count * mine, count * (grid.rank == 0)
        flat = comm.all_to_all(flat, grid, tuple(grid.axes), send, recv)
    return backend.to_host(flat).reshape(box_shape(piece)) if grid.rank == 0 else None
