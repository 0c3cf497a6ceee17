"""Weights as matrices: of W[h, 3, a, d] the rows h and the columns (3, a, d), of experts W[e, h, f] e matrices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from colossal_mpi.distarray import DistArray
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


def each(array: DistArray, batch: int) -> Iterator[DistArray]:
    """Yield, as views, the arrays that the first `batch` dims number and of which this rank has a block.

    They lie on the grid of the ranks that have a block of the same ones. **Communication:** none.
    """
    if not batch:
        yield array
        return
    dims, coords = array.layout.dims, array.grid.coords
    place = array.grid.at(**{axis: coords[axis] for axes in dims[:batch] for axis in axes})
    for index in itertools.product(*map(range, array.local.shape[:batch])):
        yield DistArray(array.local[(*index, ...)], array.shape[batch:], Layout(*dims[batch:]), place)


def as_matrix(w: DistArray, at: int) -> DistArray:
    """Return a weight of two dims or more as a matrix, whose rows are the first `at` dims.

    **Communication:** none if rows and columns are each cut by their first dim alone and evenly; else the weight moves
    to a layout in which its longest dim that is rows or columns by itself is cut by all axes, or to the whole.
    """
    if w.ndim == 2:
        return w
    if not all(_mergeable(w, dims) for dims in (range(at), range(at, w.ndim))):
        w = w.redistribute(_mergeable_layout(w, at))
    xp = backend.namespace(w.local)
    shape, block = ((math.prod(s[:at]), math.prod(s[at:])) for s in (w.shape, w.local.shape))
    return DistArray(xp.reshape(w.local, block), shape, Layout(w.layout.dims[0], w.layout.dims[at]), w.grid)


def from_matrix(x: DistArray, like: DistArray, at: int) -> DistArray:
    """Return a matrix that `as_matrix` has made as an array of the shape and in the layout of `like`."""
    if like.ndim == 2:
        return x.redistribute(like.layout)
    xp = backend.namespace(x.local)
    dims = [x.layout.dims[0], *[()] * (at - 1), x.layout.dims[1], *[()] * (like.ndim - at - 1)]
    layout = Layout(*dims).on(x.grid.axes, like.ndim)
    box = layout.box(like.shape, x.grid.axes, x.grid.coords)
    block = xp.reshape(x.local, tuple(stop - start for start, stop in box))
    return DistArray(block, like.shape, layout, x.grid).redistribute(like.layout)


def _mergeable(w: DistArray, dims: range) -> bool:
    """Say whether the blocks of these dims are blocks of the merged dim."""
    first, *rest = dims
    if not rest:
        return True
    even = w.shape[first] % w.grid.extent(w.layout.dims[first]) == 0
    return even and not any(w.layout.dims[d] for d in rest)


def _mergeable_layout(w: DistArray, at: int) -> Layout:
    single = [d for d, dims in ((0, at), (w.ndim - 1, w.ndim - at)) if dims == 1]
    cut: list[tuple[str, ...]] = [()] * w.ndim
    if single:
        cut[max(single, key=lambda d: w.shape[d])] = w.layout.cut
    return Layout(*cut)
