"""The gathering of a global array on one rank, in pieces of bounded size.

`DistArray.gather` and `DistArray.gather_pieces` call it, for example where one rank writes a file (HDF5, Hugging Face).
It calls `comm.all_to_all`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from colossal_mpi import comm
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, box_shape, slices
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution.plan import Shape

PIECE = 1 << 22
"""The greatest number of elements that the root receives at once, unless one index of the first dim has more."""


def gather_to_root(
    block: Block, shape: Shape, layout: Layout, grid: Grid, root: int, put: Callable[[Box, np.ndarray], None]
) -> Exception | None:
    """Call ``put(box, values)`` on the root for boxes of global indices that tile the array; return its exception.

    After `put` has failed, the root still receives the remaining boxes and drops them, so that no rank is left waiting.
    The root returns the failure, the other ranks return None; raise it inside `comm.agreed`, so that all ranks raise
    it.

    Parameters
    ----------
    block : array
        This rank's block of the array of global `shape` in `layout`.
    shape : tuple of int
        The global shape.
    layout : Layout
        A layout without partial sums.
    grid : Grid
        The grid.
    root : int
        The rank of the grid that gets the array.
    put : callable
        Called on the root alone, with a box and a NumPy array of its shape.

    Returns
    -------
    Exception or None
        On the root, the first exception that `put` raised; otherwise None.

    Notes
    -----
    **Communication:** the root receives every element that it does not hold, once, by an all_to_all over the grid for
    each `PIECE` elements (32 MiB of float64): n less its own block. **Adjoint:** a scatter from the root.
    """
    failure: Exception | None = None
    box = layout.box(shape, grid.axes, grid.coords)
    for pieces in _rounds(shape, layout, grid):
        xp = backend.namespace(block)
        own = [xp.reshape(block[(*slices(piece, box), ...)], (-1,)) for rank, piece in pieces if rank == grid.rank]
        flat = xp.concat(own) if len(own) > 1 else own[0] if own else xp.reshape(block, (-1,))[:0]
        if any(rank != root for rank, _ in pieces):
            counts = [0] * grid.size
            for rank, piece in pieces:
                counts[rank] += math.prod(box_shape(piece))
            send, recv = [0] * grid.size, counts if grid.rank == root else [0] * grid.size
            send[root] = counts[grid.rank]
            # X[M_axes] -> X[M] on the root
            flat = comm.all_to_all(flat, grid, tuple(grid.axes), send, recv, sum(counts))
        if grid.rank == root and failure is None:
            try:
                _put_all(put, pieces, backend.to_host(flat))
            except Exception as problem:
                failure = problem
    return failure


def _put_all(put: Callable[[Box, np.ndarray], None], pieces: list[tuple[int, Box]], flat: np.ndarray) -> None:
    start = 0
    for _, piece in pieces:
        count = math.prod(box_shape(piece))
        put(piece, flat[start : start + count].reshape(box_shape(piece)))
        start += count


def _rounds(shape: Shape, layout: Layout, grid: Grid) -> Iterator[list[tuple[int, Box]]]:
    """Yield the pieces that are sent at once, together at most `PIECE` elements, each with the rank that owns it."""
    pieces, total = list[tuple[int, Box]](), 0
    for rank in range(grid.size):
        box = layout.owned(shape, grid.axes, grid.coords_of(rank))
        for piece in _pieces(box) if box is not None else ():
            count = math.prod(box_shape(piece))
            if pieces and total + count > PIECE:
                yield pieces
                pieces, total = [], 0
            pieces.append((rank, piece))
            total += count
    if pieces:
        yield pieces


def _pieces(box: Box) -> Iterator[Box]:
    """Yield boxes of whole rows that tile a box, of at most `PIECE` elements unless a row has more."""
    if not box:
        yield box
        return
    (start, stop), *rest = box
    rows = max(1, PIECE // max(1, math.prod(box_shape(tuple(rest)))))
    for low in range(start, stop, rows):
        yield ((low, min(low + rows, stop)), *rest)
