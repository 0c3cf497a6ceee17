"""Embeddings of tokens, positions and segments: look-ups in learned tables, whose rows and columns may be cut.

Language models begin with them. They call the kernels ``lookup`` and ``lookup_backward`` of their grid.
"""

from __future__ import annotations

from numpy.typing import DTypeLike

from colossal_mpi import distarray
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction import map_layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class Embedding(Layer):
    """Rows of a table ``[v, h]`` for token ids ``[b, s]``: the product of the one-hot ids with the table.

    Parameters
    ----------
    vocabulary : int
        Number v of rows.
    hidden : int
        Width h of the stream.
    parallelism : Parallelism
        The mode, which chooses the map and the layouts.
    name : str
        Prefix of the name of the parameter ``weight`` ``[v, h]``.
    std : float
        Standard deviation of the initial table.
    seed : int, optional
        Seed of the initial table; None leaves it zero, for a table that is to be loaded.
    dtype : dtype
        Dtype of the table.

    Raises
    ------
    ShapeError
        From `forward`, on the ranks that hold it, if an id is outside of the vocabulary.

    Notes
    -----
    The input is a DistArray of integers ``[b, s]``. A rank gives zeros for the ids of rows that other ranks hold.

    **Communication:** the words of the product ``"bsv,vh->bsh"`` without its first operand: the table is gathered and
    the result reduce-scattered over the axes that cut v; backward the same in reverse.

    **Adjoint:** the rows of dy are added to the rows of the table's gradient; ids have no cotangent.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        parallelism: Parallelism,
        name: str,
        *,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        product = parallelism.product("bsv,vh->bsh", "v")
        self.axes, self.used, self.y = product.axes, product.w, product.y
        self.ids = Layout(*product.x.dims[:2])
        self.dy = product.dy
        self.table = Parameter(
            f"{name}.weight", [vocabulary, hidden], self.used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        # ids -> ids[B, S], the layout of the onehot without v
        ids = x.redistribute(self.ids)
        kernels.require_ids(ids.local, self.table.value.shape[0])
        table = self.table.use(self.used)
        # 1d: onehot[B, S, V_col] . table[V_col, H] -> Y[B, S, H] {U_col}, a look-up of the rank's own rows
        rows = kernels.of(x.grid).lookup(table.local, ids.local, table.box[0][0])
        partial = map_layout("bsh", self.axes, "v")
        y = DistArray(rows, (*x.shape, table.shape[1]), partial, x.grid)
        # Y[B, S, H] {U_col} -> Y[B, S_col, H]: reduce_scatter over col
        return y.redistribute(self.y), (ids, table.box[0])

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> None:
        ids, (start, stop) = cache
        # dY[B, S_col, H] -> dY[B, S, H]: allgather over col
        dy = dy.redistribute(self.dy)
        # onehot[B, S, V_col]^T . dY[B, S, H] -> dtable[V_col, H]; partial over the axes that cut b and s
        block = kernels.of(dy.grid).lookup_backward(dy.local, ids.local, start, stop - start)
        layout = map_layout("vh", self.axes, "bs")
        self.table.accumulate(DistArray(block, self.table.value.shape, layout, dy.grid))


class PositionEmbedding(Layer):
    """The stream plus a row of a learned table ``[p, h]`` at each position, ``y = x + table[positions]``.

    Parameters
    ----------
    positions : int
        Number p of rows.
    hidden : int
        Width h of the stream.
    parallelism : Parallelism
        The mode, which chooses the layout of the table.
    name : str
        Prefix of the name of the parameter ``weight`` ``[p, h]``.
    std : float
        Standard deviation of the initial table.
    seed : int, optional
        Seed of the initial table; None leaves it zero, for a table that is to be loaded.
    dtype : dtype
        Dtype of the table.

    Raises
    ------
    ShapeError
        From `forward`, if the sequence is longer than the table, or, on the ranks that hold it, a position is outside.

    Notes
    -----
    The positions are `Context.positions`, or the indices in the sequence where there are none.

    **Communication:** the table is gathered to the layout of the stream's h; its gradient is reduced over the axes that
    cut b and s.

    **Adjoint:** dx is dy; the sums of dy over equal positions are added to the rows of the table's gradient.
    """

    def __init__(
        self,
        positions: int,
        hidden: int,
        parallelism: Parallelism,
        name: str,
        *,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        used = Layout(None, *parallelism.stream("h").dims)
        self.table = Parameter(
            f"{name}.weight", [positions, hidden], used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        x, given = x.reduced(), ctx.positions_of(x)
        count = self.table.value.shape[0]
        if given is None and x.shape[1] > count:
            raise ShapeError(f"a sequence of {x.shape[1]} needs as many positions; the table has {count}")
        # X[B_row, S_col, H] + table[S_col, H], where each rank takes the rows of its positions
        table = self.table.use(Layout(None, x.layout.dims[2])).local
        if given is None:
            return x.like(x.local + table[slice(*x.box[1]), :]), (x.layout, None)
        kernels.require_ids(given, count)
        return x.like(x.local + kernels.of(x.grid).lookup(table, given, 0)), (x.layout, given)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        layout, given = cache
        # dY -> dY[B_row, S_col, H], the layout of X
        dy, count = dy.redistribute(layout), self.table.value.shape[0]
        # dY[B_row, S_col, H] summed over b -> dtable[P, H] {U_row,U_col}: zeros but in the rows of a rank's positions
        rows = dy.local if given is not None and given.ndim == 2 else dy.sum_over([0]).local
        if given is None:
            block = backend.zeros_like(rows, (count, rows.shape[-1]))
            block[slice(*dy.box[1]), :] = rows
        else:
            block = kernels.of(dy.grid).lookup_backward(rows, given, 0, count)
        summed = Layout(None, layout.dims[2], partial=(*layout.dims[0], *layout.dims[1]))
        self.table.accumulate(DistArray(block, self.table.value.shape, summed, dy.grid))
        return dy


class SegmentEmbedding(Layer):
    """The stream plus, for each token, the row of a learned table ``[n, h]`` that its segment names.

    Parameters
    ----------
    segments : int
        Number n of rows, such as 2 for the first and the second of two sentences.
    hidden : int
        Width h of the stream.
    parallelism : Parallelism
        The mode, which chooses the layout of the table.
    name : str
        Prefix of the name of the parameter ``weight`` ``[n, h]``.
    std : float
        Standard deviation of the initial table.
    seed : int, optional
        Seed of the initial table; None leaves it zero, for a table that is to be loaded.
    dtype : dtype
        Dtype of the table.

    Raises
    ------
    ShapeError
        From `forward`, if `Context.segments` is not ``[b, s]``, or, on the ranks that hold it, a segment is outside.

    Notes
    -----
    The segments are `Context.segments`, or 0 for all tokens where there are none.

    **Communication:** segments in another layout than `Parallelism.tokens` are redistributed. The table is gathered to
    the layout of the stream's h; its gradient is reduced over the axes that cut b and s.

    **Adjoint:** dx is dy; the sums of dy over the tokens of each segment are added to the rows of the table's gradient.

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
        dtype: DTypeLike = "float32",
    ) -> None:
        self.used = Layout(None, *parallelism.stream("h").dims)
        self.table = Parameter(
            f"{name}.weight", [segments, hidden], self.used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        layout, x = x.layout.with_partial(), x.redistribute(Layout(*x.layout.dims[:2], *self.used.dims[1:]))
        table, ids = self.table.use(self.used), self._ids(x, ctx)
        # X[B_row, S_col, H] + table[segments[B_row, S_col], H]
        return x.like(x.local + kernels.of(x.grid).lookup(table.local, ids, 0)), (layout, x.layout, ids)

    def _ids(self, x: DistArray, ctx: Context) -> Block:
        """Return the segments of this rank's tokens."""
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

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        layout, used, ids = cache
        # dY -> dY[B_row, S_col, H], the layout in which the table was added
        dy = dy.redistribute(used)
        # dY[B_row, S_col, H] summed over the tokens of each segment -> dtable[N, H] {U_row,U_col}
        block = kernels.of(dy.grid).lookup_backward(dy.local, ids, 0, self.table.value.shape[0])
        summed = Layout(None, dy.layout.dims[2], partial=[axis for dim in dy.layout.dims[:2] for axis in dim])
        self.table.accumulate(DistArray(block, self.table.value.shape, summed, dy.grid))
        return dy.redistribute(layout)
