"""Embeddings: tables of which each rank holds some rows and some columns."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer, Parameter
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.subscripts import map_layout


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
        table = self.table.value.redistribute(self.used)
        rows = kernels.lookup(table.local, ids.local, table.box[0][0])
        partial = map_layout("bsh", self.axes, "v")
        y = DistArray(rows, (*x.shape, table.shape[1]), partial, x.grid)
        return y.redistribute(self.y), (ids, table.box[0])

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> None:
        """Add the rows of `dy` to the gradient of the table; ids have no cotangent."""
        ids, (start, stop) = cache
        dy = dy.redistribute(self.dy)
        block = kernels.lookup_backward(dy.local, ids.local, start, stop - start)
        layout = map_layout("vh", self.axes, "bs")
        self.table.accumulate(DistArray(block, self.table.value.shape, layout, dy.grid))


class PositionEmbedding(Layer):
    """Add row i of a learned table ``[p, h]`` to position i of the stream.

    **Communication:** the table is gathered to the cut of h; its gradient is reduced over the axes that cut b and s.
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
        self.used = Layout(None, *parallelism.stream("h").dims)
        self.table = Parameter(
            f"{name}.weight", [positions, hidden], self.used, parallelism, std=std, seed=seed, dtype=dtype
        )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x + table[positions]``."""
        if x.shape[1] > self.table.value.shape[0]:
            raise ShapeError(
                f"a sequence of {x.shape[1]} needs as many positions; the table has {self.table.value.shape[0]}"
            )
        start, stop = x.box[1]
        table = self.table.value.redistribute(self.used)
        return x.like(x.local + table.local[start:stop, :]), x.layout

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy`; its sum over the batch goes to the rows of the table."""
        dy = dy.redistribute(cache)
        start, stop = dy.box[1]
        rows = dy.sum_over([0])
        block = backend.zeros_like(dy.local, (self.table.value.shape[0], dy.local.shape[2]))
        block[start:stop, :] = rows.local
        layout = Layout(*self.used.dims, partial=(*rows.layout.partial, *dy.layout.dims[1]))
        self.table.accumulate(DistArray(block, self.table.value.shape, layout, dy.grid))
        return dy
