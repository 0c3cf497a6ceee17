"""Multi-head attention: heads are a letter that the map cuts, so that attention itself is local in every mode."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.kernels import reference as kernels
from colossal_mpi.layers.layer import Chain, Context, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism


class CausalAttention(Layer):
    """Causal softmax attention of packed queries, keys and values ``[b, s, 3, a, d]`` to ``[b, s, a, d]``.

    Batch and heads may be cut, the sequence and the head dim may not. **Communication:** none. The backward pass
    makes the probabilities again from the peaks and sums of their scores, so that no s x s array is kept.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.layout = parallelism.inside("bsad", "a")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the attention of each head."""
        q, k, v = (x.local[:, :, t, ...] for t in range(3))
        out, statistics = kernels.attention(q, k, v)
        b, s, _, a, d = x.shape
        y = DistArray(out, (b, s, a, d), self.layout, x.grid)
        return y, (x, y, statistics)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the packed queries, keys and values."""
        x, y, statistics = cache
        q, k, v = (x.local[:, :, t, ...] for t in range(3))
        grads = kernels.attention_backward(dy.redistribute(y.layout).local, q, k, v, y.local, statistics)
        return x.like(backend.namespace(q).stack(grads, axis=2))


class SelfAttention(Chain):
    """Causal multi-head self-attention of the residual stream, with its input and output products.

    Parameters
    ----------
    hidden, heads : int
        `heads` must divide `hidden`.
    parallelism : Parallelism
    name : str
    std, out_std : float
        Standard deviations of the initial weights of the input and the output product.
    seed, dtype

    Raises
    ------
    ShapeError
        If `heads` does not divide `hidden`.

    References
    ----------
    Vaswani et al.: Attention is all you need, 2017.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        parallelism: Parallelism,
        name: str,
        *,
        std: float = 0.02,
        out_std: float = 0.02,
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        if hidden % heads:
            fitting = [str(n) for n in range(1, min(hidden, 4 * heads) + 1) if hidden % n == 0]
            raise ShapeError(f"{heads} heads do not divide hidden={hidden}: use heads in {{{', '.join(fitting)}}}")
        sizes = {"h": hidden, "t": 3, "a": heads, "d": hidden // heads}
        common = {"seed": seed, "dtype": dtype}
        super().__init__(
            Linear("bsh,htad->bstad", sizes, "a", parallelism, f"{name}.qkv", std=std, **common),
            CausalAttention(parallelism),
            Linear("bsad,adh->bsh", sizes, "a", parallelism, f"{name}.out", std=out_std, **common),
        )
