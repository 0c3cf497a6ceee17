"""Multi-head attention: heads are a letter that the map cuts, so that attention itself is local in every mode."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import DTypeError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Chain, Context, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism


class Attention(Layer):
    """Softmax attention of packed queries, keys and values ``[b, s, 3, a, d]`` to ``[b, s, a, d]``.

    Batch and heads may be cut, the sequence and the head dim may not. The keys that count are those where the
    context's `mask` is true; a query that sees no key gives zeros. The backward pass makes the probabilities again
    from the peaks and sums of their scores, so that no s x s array is kept.

    **Communication:** none; a mask in another layout than `Parallelism.tokens` is redistributed.

    Parameters
    ----------
    parallelism : Parallelism
    causal : bool
        Whether position i sees the positions to i only.
    """

    def __init__(self, parallelism: Parallelism, *, causal: bool = True) -> None:
        self.layout, self.keys = parallelism.inside("bsad", "a"), parallelism.inside("bs", "a")
        self.causal = causal

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the attention of each head.

        Raises
        ------
        ShapeError
            If the context's mask is not ``[b, s]``.
        DTypeError
            If it is not bool.
        """
        b, s, _, a, d = x.shape
        mask = None if ctx.mask is None else self._mask(ctx.mask, (b, s))
        q, k, v = (x.local[:, :, t, ...] for t in range(3))
        out, statistics = kernels.attention(q, k, v, self.causal, mask)
        y = DistArray(out, (b, s, a, d), self.layout, x.grid)
        return y, (x, y, statistics, mask)

    def _mask(self, mask: DistArray, shape: tuple[int, int]) -> Any:
        if mask.shape != shape:
            raise ShapeError(
                f"attention: the mask must be of shape [b, s] = {list(shape)}, as its input; it is {list(mask.shape)}"
            )
        if mask.local.dtype != backend.namespace(mask.local).bool:
            raise DTypeError(f"attention: the mask must be bool, true where a key counts; it is {mask.local.dtype}")
        return mask.redistribute(self.keys).local

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the packed queries, keys and values."""
        x, y, statistics, mask = cache
        q, k, v = (x.local[:, :, t, ...] for t in range(3))
        do = dy.redistribute(y.layout).local
        grads = kernels.attention_backward(do, q, k, v, y.local, statistics, self.causal, mask)
        return x.like(backend.namespace(q).stack(grads, axis=2))


class SelfAttention(Chain):
    """Multi-head self-attention of the residual stream, with its input and output products.

    Parameters
    ----------
    hidden, heads : int
        `heads` must divide `hidden`.
    parallelism : Parallelism
    name : str
    causal : bool
        Whether position i sees the positions to i only.
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
        causal: bool = True,
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
            Attention(parallelism, causal=causal),
            Linear("bsad,adh->bsh", sizes, "a", parallelism, f"{name}.out", std=out_std, **common),
        )
