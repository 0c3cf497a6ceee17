"""The pre-norm transformer block."""

from __future__ import annotations

from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.activation import GELU
from colossal_mpi.layers.attention import SelfAttention
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism


class MLP(Layer):
    """Two products with a GELU between them, ``[b, s, h]`` to ``[b, s, f]`` and back."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        parallelism: Parallelism,
        name: str,
        *,
        out_std: float = 0.02,
        **common: Any,
    ) -> None:
        sizes = {"h": hidden, "f": inner}
        self.up = Linear("bsh,hf->bsf", sizes, "f", parallelism, f"{name}.up", **common)
        self.activation = GELU()
        self.down = Linear("bsf,fh->bsh", sizes, "f", parallelism, f"{name}.down", **{**common, "std": out_std})

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the output, in the layout of the stream."""
        z, first = self.up.forward(x, ctx)
        a, second = self.activation.forward(z, ctx)
        y, third = self.down.forward(a, ctx)
        return y, (first, second, third)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the stream."""
        first, second, third = cache
        dy = self.activation.backward(self.down.backward(dy, third, later), second, later)
        return self.up.backward(dy, first, later)


class Block(Layer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` (Radford et al. 2019)."""

    def __init__(self, hidden: int, heads: int, inner: int, parallelism: Parallelism, name: str, **common: Any) -> None:
        dtype = common.get("dtype", "float32")
        self.norm1 = LayerNorm(hidden, parallelism, f"{name}.norm1", dtype=dtype)
        self.attention = SelfAttention(hidden, heads, parallelism, f"{name}.attention", **common)
        self.norm2 = LayerNorm(hidden, parallelism, f"{name}.norm2", dtype=dtype)
        self.mlp = MLP(hidden, inner, parallelism, f"{name}.mlp", **common)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the next residual stream."""
        y, first = self.norm1.forward(x, ctx)
        y, second = self.attention.forward(y, ctx)
        x = x + y
        y, third = self.norm2.forward(x, ctx)
        y, fourth = self.mlp.forward(y, ctx)
        return x + y, (first, second, third, fourth)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the residual stream."""
        first, second, third, fourth = cache
        dy = dy + self.norm2.backward(self.mlp.backward(dy, fourth, later), third, later)
        return dy + self.norm1.backward(self.attention.backward(dy, second, later), first, later)
