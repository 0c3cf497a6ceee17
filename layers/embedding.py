"""Embeddings: tables of which each rank holds some rows and some columns."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend
from colossal_mpi.backend import Block
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer, Parameter
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.positions import given_positions
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
    """Add to the stream the rows of a learned table ``[p, h]`` at the context's positions, or at the indices in s.

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
        positions, table = given_positions(ctx, x), self.table.value.redistribute(self.used)
        if positions is None:
            rows = self._leading(x.shape[1], table.local)[slice(*x.box[1]), :]
        else:
            kernels.require_ids(positions, table.shape[0])
            rows = kernels.lookup(table.local, positions, 0)
        return x.like(x.local + rows), (x.layout, positions)

    def _leading(self, length: int, table: Block) -> Block:
        if length > self.table.value.shape[0]:
            raise ShapeError(
                f"a sequence of {length} needs as many positions; the table has {self.table.value.shape[0]}"
            )
        return table

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy`; its sum over tokens of the same position goes to the rows of the table."""
        layout, positions = cache
        dy = dy.redistribute(layout)
        each = positions is not None and positions.ndim == 2
        rows, count = dy if each else dy.sum_over([0]), self.table.value.shape[0]
        if positions is None:
            block = backend.zeros_like(dy.local, (count, dy.local.shape[2]))
            block[slice(*dy.box[1]), :] = rows.local
        else:
            block = kernels.lookup_backward(rows.local, positions, 0, count)
        partial = [axis for dim in layout.dims[:2] for axis in dim]
        summed = Layout(*self.used.dims, partial=partial)
        self.table.accumulate(DistArray(block, self.table.value.shape, summed, dy.grid))
        return dy
