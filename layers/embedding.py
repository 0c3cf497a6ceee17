"""Embeddings: tables of which each rank holds some rows and some columns."""

from __future__ import annotations

from typing import Any

from colossal_mpi import distarray
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.positions import given_positions
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import map_layout
from colossal_mpi.platform import backend


class Embedding(Layer):
    """Rows of a table ``[v, h]`` by token ids ``[b, s]``: the product of the one-hot ids with the table.

    The vocabulary is cut; a rank gives zeros for ids of other ranks' rows, and the sum over the axes that cut it
    is reduce-scattered into the stream.

    Notes
    -----
    **Communication:** that of ``"bsv,vh->bsh"`` less its first operand: the table is gathered, the result
    reduce-scattered, backward the same in reverse.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        parallelism: Parallelism,
        name: str,
        *,
        std: float = 0.02,
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        product = parallelism.product("bsv,vh->bsh", "v")
        self.axes, self.used, self.y = product.axes, product.w, product.y
        self.ids = Layout(*product.x.dims[:2])
        self.dy = product.dy
        self.table = Parameter(
            f"{name}.weight", [vocabulary, hidden], self.used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the rows of the table at the integer ids `x`, in the layout of the stream."""
        ids = x.redistribute(self.ids)
        kernels.require_ids(ids.local, self.table.value.shape[0])
        table = self.table.use(self.used)
        rows = kernels.of(x.grid).lookup(table.local, ids.local, table.box[0][0])
        partial = map_layout("bsh", self.axes, "v")
        y = DistArray(rows, (*x.shape, table.shape[1]), partial, x.grid)
        return y.redistribute(self.y), (ids, table.box[0])

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> None:
        """Add the rows of `dy` to the gradient of the table; ids have no cotangent."""
        ids, (start, stop) = cache
        dy = dy.redistribute(self.dy)
        block = kernels.of(dy.grid).lookup_backward(dy.local, ids.local, start, stop - start)
        layout = map_layout("vh", self.axes, "bs")
        self.table.accumulate(DistArray(block, self.table.value.shape, layout, dy.grid))


class PositionEmbedding(Layer):
    """Add row i of a learned table ``[p, h]`` to position i of the stream, or the rows of the context's `positions`.

    **Communication:** the table is gathered to the cut of h; its gradient is reduced over the axes that cut b and s.

    Raises
    ------
    ShapeError
        From `forward`, if the sequence is longer than the table, or, on the ranks that hold it, a position is outside.
    """

    def __init__(
        self,
        positions: int,
        hidden: int,
        parallelism: Parallelism,
        name: str,
        *,
        std: float = 0.02,
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        used = Layout(None, *parallelism.stream("h").dims)
        self.table = Parameter(
            f"{name}.weight", [positions, hidden], used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x + table[positions]``, in the layout of `x` with its partial sums reduced."""
        x, given = x.reduced(), given_positions(ctx, x)
        count = self.table.value.shape[0]
        if given is None and x.shape[1] > count:
            raise ShapeError(f"a sequence of {x.shape[1]} needs as many positions; the table has {count}")
        table = self.table.use(Layout(None, x.layout.dims[2])).local
        if given is None:
            return x.like(x.local + table[slice(*x.box[1]), :]), (x.layout, None)
        kernels.require_ids(given, count)
        return x.like(x.local + kernels.of(x.grid).lookup(table, given, 0)), (x.layout, given)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy`; its sums over equal positions go to the rows of the table."""
        layout, given = cache
        dy, count = dy.redistribute(layout), self.table.value.shape[0]
        rows = dy.local if given is not None and given.ndim == 2 else dy.sum_over([0]).local
        if given is None:
            block = backend.zeros_like(rows, (count, rows.shape[-1]))
            block[slice(*dy.box[1]), :] = rows
        else:
            block = kernels.of(dy.grid).lookup_backward(rows, given, 0, count)
        of_table = Layout(None, layout.dims[2], partial=(*layout.dims[0], *layout.dims[1]))
        self.table.accumulate(DistArray(block, self.table.value.shape, of_table, dy.grid))
        return dy


class SegmentEmbedding(Layer):
    """Add to each token of the stream the row of a learned table ``[n, h]`` that the context's `segments` name.

    **Communication:** segments in another layout than `Parallelism.tokens` are redistributed; the table is gathered to
    the cut of h, and its gradient is reduced over the axes that cut b and s.

    Parameters
    ----------
    segments : int
        The number n of kinds of segments.
    hidden, parallelism, name, std, seed, dtype

    Raises
    ------
    ShapeError
        From `forward`, if the context's segments are not ``[b, s]``, or, on the ranks that hold it, one is none of n.

    References
    ----------
    Devlin et al.: BERT, 2019.
    """

    def __init__(
        self,
        segments: int,
        hidden: int,
        parallelism: Parallelism,
        name: str,
        *,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: Any = "float32",
    ) -> None:
        self.used = Layout(None, *parallelism.stream("h").dims)
        self.table = Parameter(
            f"{name}.weight", [segments, hidden], self.used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x + table[segments]``, in the layout of `x` with its partial sums reduced."""
        layout, x = x.layout.with_partial(), x.redistribute(Layout(*x.layout.dims[:2], *self.used.dims[1:]))
        table, ids = self.table.use(self.used), self._ids(x, ctx)
        return x.like(x.local + kernels.of(x.grid).lookup(table.local, ids, 0)), (layout, x.layout, ids)

    def _ids(self, x: DistArray, ctx: Context) -> Any:
        given, layout = ctx.segments, Layout(*x.layout.dims[:2])
        if given is None:
            return distarray.zeros(x.shape[:2], x.grid, layout, "int64").local
        if given.shape != x.shape[:2]:
            raise ShapeError(
                f"the segments must be of shape [b, s] = {list(x.shape[:2])}, as the stream; they are "
                f"{list(given.shape)}"
            )
        kinds = self.table.value.shape[0]
        try:
            kernels.require_ids(given.local, kinds)
        except ShapeError:
            raise ShapeError(f"segments must be from 0 to {kinds - 1}, for a table of {kinds}") from None
        return given.redistribute(layout).local

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy`; its sums over the tokens of each segment go to the rows of the table."""
        layout, used, ids = cache
        dy = dy.redistribute(used)
        block = kernels.of(dy.grid).lookup_backward(dy.local, ids, 0, self.table.value.shape[0])
        summed = Layout(None, dy.layout.dims[2], partial=[axis for dim in dy.layout.dims[:2] for axis in dim])
        self.table.accumulate(DistArray(block, self.table.value.shape, summed, dy.grid))
        return dy.redistribute(layout)
