"""The pre-norm transformer block."""

from __future__ import annotations

from typing import Any

from colossal_mpi.layers.activation import GELU
from colossal_mpi.layers.attention import SelfAttention
from colossal_mpi.layers.layer import Chain, Residual
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism


class MLP(Chain):
    """Two products with a GELU between them, ``[b, s, h]`` to ``[b, s, f]`` and back."""

    def __init__(
        self, hidden: int, inner: int, parallelism: Parallelism, name: str, *, out_std: float = 0.02, **common: Any
    ) -> None:
        sizes = {"h": hidden, "f": inner}
        super().__init__(
            Linear("bsh,hf->bsf", sizes, "f", parallelism, f"{name}.up", **common),
            GELU(),
            Linear("bsf,fh->bsh", sizes, "f", parallelism, f"{name}.down", **{**common, "std": out_std}),
        )


class TransformerBlock(Chain):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))`` (Radford et al. 2019).

    Parameters
    ----------
    hidden, heads, inner : int
        Width of the stream, number of heads, width of the MLP.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters.
    **common
        ``std``, ``out_std``, ``seed`` and ``dtype``, as `SelfAttention` takes them.
    """

    def __init__(self, hidden: int, heads: int, inner: int, parallelism: Parallelism, name: str, **common: Any) -> None:
        def norm(which: str) -> LayerNorm:
            return LayerNorm(hidden, parallelism, f"{name}.{which}", dtype=common.get("dtype", "float32"))

        attention = SelfAttention(hidden, heads, parallelism, f"{name}.attention", **common)
        mlp = MLP(hidden, inner, parallelism, f"{name}.mlp", **common)
        super().__init__(Residual(norm("norm1"), attention), Residual(norm("norm2"), mlp))
