"""The norm of each head's queries and keys, before their positions turn them and attention compares them.

`SelfAttention` puts it behind its input products. It is `RMSNorm` with one gain for all heads.
"""

from __future__ import annotations

from numpy.typing import DTypeLike

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later
from colossal_mpi.layers.norm import RMSNorm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


class HeadNorm(RMSNorm):
    """RMSNorm of the heads of ``[b, s, ..., d]`` over d, with one gain ``[d]`` for all heads.

    Parameters
    ----------
    width : int
        Width d of a head.
    parallelism : Parallelism
        The mode; every rank has the whole gain.
    name : str
        Prefix of the name of the parameter ``gain``, ``[d]``.
    entry : int, optional
        The entry of dim 2 that is normalised: in packed queries, keys and values or keys and values; None: all.
    eps : float
        The number that is added to the mean square.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    ShapeError
        From `forward`, if the last dim of x is not `width`.

    Notes
    -----
    Batch, sequence and heads may be cut, d may not.

    **Communication:** none but the reduction of the gradient of the gain over the axes that cut b, s or the heads.
    Partial sums of cotangents stay partial.

    References
    ----------
    Henry et al.: Query-key normalization for transformers, 2020. Dehghani et al.: Scaling vision transformers to 22
    billion parameters, 2023.
    """

    def __init__(
        self,
        width: int,
        parallelism: Parallelism,
        name: str,
        entry: int | None = None,
        *,
        eps: float = 1e-6,
        dtype: DTypeLike = "float32",
    ) -> None:
        self.size, self.eps, self.name, self.entry = width, eps, name, entry
        self.gain = Parameter(f"{name}.gain", [width], parallelism.stream("d"), parallelism, fill=1.0, dtype=dtype)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        y, cache = super().forward(x, ctx)
        return self._beside(x.reduced(), y), (x.layout.with_partial(), cache)

    def _normalised(self, x: DistArray) -> DistArray:
        return self._entry_of(x.reduced())

    def _cotangent_layout(self, dy: DistArray, x: DistArray) -> Layout:
        return dy.layout

    def _entry_of(self, x: DistArray) -> DistArray:
        return x if self.entry is None else x[:, :, self.entry]

    def _beside(self, whole: DistArray, part: DistArray) -> DistArray:
        """Return an array with another part in the place of the entry."""
        if self.entry is None:
            return part
        block = backend.empty_like(whole.local, whole.local.shape)
        block[...] = whole.local
        block[:, :, self.entry, ...] = part.local
        return whole.like(block)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        layout, cache = cache
        # dY -> dY in the layout of X, where partial sums may stay: the pass is linear in dY
        dy = dy.redistribute(layout.with_partial(*[axis for axis in dy.layout.partial if axis not in layout.cut]))
        return self._beside(dy, super().backward(self._entry_of(dy), cache, later))
