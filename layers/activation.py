"""Elementwise layers: local in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


class Activation(Layer):
    """Base of the elementwise layers: the kernel of its name and that one's ``_backward``.

    **Communication:** none; partial sums, of which the function would not be that of the sum, are reduced first.
    """

    kernel: str

    def value(self, x: Block, grid: Grid) -> Block:
        """Return the function of a block."""
        function: Callable[[Block], Block] = getattr(kernels.of(grid), self.kernel)
        return function(x)

    def cotangent(self, dy: Block, x: Block, grid: Grid) -> Block:
        """Return the cotangent of a block `x` for that of the function."""
        function: Callable[[Block, Block], Block] = getattr(kernels.of(grid), f"{self.kernel}_backward")
        return function(dy, x)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the function of each element, in the layout of `x`."""
        x = x.reduced()
        return x.like(self.value(x.local, x.grid)), x

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy` times the slope at each element."""
        dy = dy.redistribute(cache.layout)
        return cache.like(self.cotangent(dy.local, cache.local, dy.grid))


class GELU(Activation):
    """The Gaussian error linear unit.

    Parameters
    ----------
    approximate : {"tanh", "none"}
        By the hyperbolic tangent, as GPT-2 has it, or by the error function, as BERT and ViT have it.

    Raises
    ------
    OptionError
        If there is no such form.

    References
    ----------
    Hendrycks, Gimpel: Gaussian error linear units, 2016.
    """

    def __init__(self, approximate: str = "tanh") -> None:
        if approximate not in ("tanh", "none"):
            raise OptionError(f"GELU(approximate={approximate!r}): use 'tanh' or 'none'")
        self.kernel = "gelu" if approximate == "tanh" else "gelu_erf"


class SiLU(Activation):
    """``x sigmoid(x)`` (Elfwing, Uchibe, Doya 2017; Ramachandran, Zoph, Le 2017: swish)."""

    kernel = "silu"


class ReLU(Activation):
    """The positive part of each element, of slope 0 at 0."""

    kernel = "relu"


class Tanh(Activation):
    """The hyperbolic tangent, as BERT's pooler has it."""

    kernel = "tanh"


class Gated(Layer):
    """``activation(gate) up`` of pairs ``[..., 2, f]`` of gate and up, to ``[..., f]``.

    With SiLU it is SwiGLU, with GELU GEGLU. **Communication:** none; partial sums are reduced first.

    Parameters
    ----------
    activation : Activation

    References
    ----------
    Shazeer: GLU variants improve transformer, 2020.
    """

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the gated values, in the layout of `x` without its pairs.

        Raises
        ------
        ShapeError
            If the last dim but one is not 2.
        """
        if x.ndim < 2 or x.shape[-2] != 2:
            raise ShapeError(f"a gated activation takes pairs of gate and up, [..., 2, f]; its input is {x.shape}")
        *leading, _, last = x.layout.dims
        x = x.redistribute(Layout(*leading, None, last))
        y = self.activation.value(x.local[..., 0, :], x.grid)
        y *= x.local[..., 1, :]
        return DistArray(y, (*x.shape[:-2], x.shape[-1]), Layout(*leading, last), x.grid), x

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangents of gate and up."""
        *leading, _, last = cache.layout.dims
        dy = dy.redistribute(Layout(*leading, last)).local
        gate, up = (cache.local[..., t, :] for t in range(2))
        dx = backend.empty_like(cache.local, cache.local.shape)
        dx[..., 0, :] = self.activation.cotangent(dy * up, gate, cache.grid)
        dx[..., 1, :] = dy * self.activation.value(gate, cache.grid)
        return cache.like(dx)


ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "gelu-tanh": GELU,
    "gelu": lambda: GELU("none"),
    "silu": SiLU,
    "relu": ReLU,
    "tanh": Tanh,
}
"""The activations by the names that models give them; "gelu" is the exact one, as in PyTorch."""

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu-tanh": "gelu-tanh", "reglu": "relu"}
"""The gated forms by their names, and the activation of their gate."""
