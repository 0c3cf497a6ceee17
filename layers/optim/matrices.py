"""Views of weights as matrices: W[H, 3, A, D] has H rows and (3, A, D) columns, the experts' W[E, H, F] is E matrices.

Adafactor and Muon call these functions, which redistribute a weight only if its blocks are not blocks of the matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from colossal_mpi.distarray import DistArray
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


def unstacked(array: DistArray, batch: int) -> Iterator[DistArray]:
    """Yield views of the arrays that the first `batch` dims count, of which this rank has a block.

    The grid of each view has the ranks that have a block of it. **Communication:** none.
    """
    if not batch:
        yield array
        return
    dims, coords = array.layout.dims, array.grid.coords
    grid = array.grid.at(**{axis: coords[axis] for axes in dims[:batch] for axis in axes})
    for index in itertools.product(*map(range, array.local.shape[:batch])):
        yield DistArray(array.local[(*index, ...)], array.shape[batch:], Layout(*dims[batch:]), grid)


def as_matrix(w: DistArray, rows: int) -> DistArray:
    """Return a weight of two dims or more as a matrix. Its first `rows` dims become the rows.

    **Communication:** none if rows and columns are each cut evenly and over their first dim alone. Otherwise the
    weight is redistributed: all axes then cut the longest dim that makes rows or columns by itself, or no dim is cut.
    """
    if w.ndim == 2:
        return w
    if not all(_mergeable(w, dims) for dims in (range(rows), range(rows, w.ndim))):
        # W[H_row, 3, A_col, D] -> W[H_(row,col), 3, A, D] or the like: redistribution
        w = w.redistribute(_mergeable_layout(w, rows))
    xp = backend.namespace(w.local)
    shape, block = ((math.prod(s[:rows]), math.prod(s[rows:])) for s in (w.shape, w.local.shape))
    return DistArray(xp.reshape(w.local, block), shape, Layout(w.layout.dims[0], w.layout.dims[rows]), w.grid)


def from_matrix(x: DistArray, like: DistArray, rows: int) -> DistArray:
    """Return a matrix of `as_matrix` in the shape and the layout of `like`. **Communication:** as there, in reverse."""
    if like.ndim == 2:
        # X[R_row, C_col] -> X in the layout of `like`: redistribution
        return x.redistribute(like.layout)
    xp = backend.namespace(x.local)
    dims = [x.layout.dims[0], *[()] * (rows - 1), x.layout.dims[1], *[()] * (like.ndim - rows - 1)]
    layout = Layout(*dims).on(x.grid.axes, like.ndim)
    box = layout.box(like.shape, x.grid.axes, x.grid.coords)
    block = xp.reshape(x.local, tuple(stop - start for start, stop in box))
    # W[H_(row,col), 3, A, D] -> W[H_row, 3, A_col, D] or the like: the inverse redistribution of `as_matrix`
    return DistArray(block, like.shape, layout, x.grid).redistribute(like.layout)


def _mergeable(w: DistArray, dims: range) -> bool:
    """Say whether the blocks of these dims are blocks of the merged dim."""
    first, *rest = dims
    if not rest:
        return True
    even = w.shape[first] % w.grid.extent(w.layout.dims[first]) == 0
    return even and not any(w.layout.dims[d] for d in rest)


def _mergeable_layout(w: DistArray, rows: int) -> Layout:
    """Return a layout in which the blocks of a weight are blocks of its matrix."""
    single = [d for d, dims in ((0, rows), (w.ndim - 1, w.ndim - rows)) if dims == 1]
    cut: list[tuple[str, ...]] = [()] * w.ndim
    if single:
        cut[max(single, key=lambda d: w.shape[d])] = w.layout.cut
    return Layout(*cut)
