"""Activation functions: elementwise ones, which are local in every layout, gated ones, and softmax over a cut dim.

MLPs, experts and the heads of models choose one by name from `ACTIVATIONS` or `GATED`. The kernels of the array's grid
compute the functions of a block.
"""

from __future__ import annotations

from collections.abc import Callable

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.kernels import like, wide
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

_SIGMOID = 1.702
"""The factor with which a sigmoid comes nearest to the distribution function of the standard normal."""


class Activation(Layer):
    """Base of the elementwise layers, which call the kernel of their name forward and ``<name>_backward`` backward.

    **Communication:** none for complete arrays; partial sums are reduced first, because the function of a sum is not
    the sum of the functions.
    """

    kernel: str

    def value(self, x: Block, grid: Grid) -> Block:
        """Return the function of each element of a block."""
        function: Callable[[Block], Block] = getattr(kernels.of(grid), self.kernel)
        return function(x)

    def cotangent(self, dy: Block, x: Block, grid: Grid) -> Block:
        """Return the cotangent of a block.

        Parameters
        ----------
        dy : array
            Cotangent of the function's values, of the shape of `x`.
        x : array
            The block.
        grid : Grid
            The grid, which has chosen the kernels.

        Returns
        -------
        array
            The cotangent of `x`.
        """
        function: Callable[[Block, Block], Block] = getattr(kernels.of(grid), f"{self.kernel}_backward")
        return function(dy, x)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        given, x = x, x.reduced()
        return x.like(self.value(x.local, x.grid)), self.save(given, x)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        x: DistArray = self.load(cache, DistArray.reduced)
        # dY[B_row, S, F_col] * slope(X[B_row, S, F_col])
        dy = dy.redistribute(x.layout)
        return x.like(self.cotangent(dy.local, x.local, dy.grid))


class GELU(Activation):
    """The Gaussian error linear unit, ``y = x Phi(x)`` with the cumulative normal distribution Phi.

    Parameters
    ----------
    approximate : {"tanh", "none", "sigmoid"}
        ``"tanh"`` approximates Phi by the hyperbolic tangent, as GPT-2 does; ``"none"`` takes the error function, as
        BERT and ViT do; ``"sigmoid"`` takes ``sigmoid(1.702 x)``, as CLIP does.

    Raises
    ------
    OptionError
        If there is no such form.

    Notes
    -----
    **Communication:** none for complete arrays; partial sums are reduced first.

    References
    ----------
    Hendrycks, Gimpel: Gaussian error linear units, 2016.
    """

    def __init__(self, approximate: str = "tanh") -> None:
        names = {"tanh": "gelu", "none": "gelu_erf", "sigmoid": "silu"}
        if approximate not in names:
            raise OptionError(f"GELU(approximate={approximate!r}): use 'tanh', 'none' or 'sigmoid'")
        self.kernel, self.scaled = names[approximate], approximate == "sigmoid"

    def value(self, x: Block, grid: Grid) -> Block:
        if not self.scaled:
            return super().value(x, grid)
        # x sigmoid(1.702 x) = silu(1.702 x) / 1.702
        return like(x, super().value(_SIGMOID * wide(x), grid) / _SIGMOID)

    def cotangent(self, dy: Block, x: Block, grid: Grid) -> Block:
        if not self.scaled:
            return super().cotangent(dy, x, grid)
        return like(x, super().cotangent(wide(dy), _SIGMOID * wide(x), grid))


class SiLU(Activation):
    """The sigmoid linear unit, ``y = x sigmoid(x)``, which is also called swish.

    Notes
    -----
    **Communication:** none for complete arrays; partial sums are reduced first.

    References
    ----------
    Elfwing, Uchibe, Doya: Sigmoid-weighted linear units, 2017. Ramachandran, Zoph, Le: Searching for activation
    functions, 2017 (swish).
    """

    kernel = "silu"


class ReLU(Activation):
    """The rectified linear unit, ``y = max(x, 0)``, with slope 0 at 0.

    Notes
    -----
    **Communication:** none for complete arrays; partial sums are reduced first.
    """

    kernel = "relu"


class Tanh(Activation):
    """The hyperbolic tangent, as in the pooler of BERT."""

    kernel = "tanh"


class Gated(Layer):
    """A gated activation, ``y = activation(gate) up``, of pairs ``[..., 2, f]`` of gate and up to ``[..., f]``.

    Parameters
    ----------
    activation : Activation
        The function of the gate: with SiLU the layer is SwiGLU, with GELU it is GEGLU.

    Raises
    ------
    ShapeError
        From `forward`, if the last dim but one is not 2.

    Notes
    -----
    The output has the layout of the input without the dim of pairs, which may not be cut.

    **Communication:** none for complete arrays whose pairs are whole; partial sums are reduced first.

    References
    ----------
    Shazeer: GLU variants improve transformer, 2020.
    """

    def __init__(self, activation: Activation) -> None:
        self.activation = activation

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        if x.ndim < 2 or x.shape[-2] != 2:
            raise ShapeError(f"a gated activation takes pairs of gate and up, [..., 2, f]; its input is {x.shape}")
        given, x = x, self._whole_pairs(x)
        # activation(X[B, S, 0, F_col]) * X[B, S, 1, F_col] -> Y[B, S, F_col]
        y = self.activation.value(x.local[..., 0, :], x.grid)
        y *= x.local[..., 1, :]
        *leading, _, last = x.layout.dims
        return DistArray(y, (*x.shape[:-2], x.shape[-1]), Layout(*leading, last), x.grid), self.save(given, x)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        x: DistArray = self.load(cache, self._whole_pairs)
        *leading, _, last = x.layout.dims
        # dY -> dY[B, S, F_col], the layout of Y
        dy = dy.redistribute(Layout(*leading, last))
        gate, up = (x.local[..., t, :] for t in range(2))
        # dY[B, S, F_col] -> dX[B, S, 2, F_col]
        dx = backend.empty_like(x.local, x.local.shape)
        dx[..., 0, :] = self.activation.cotangent(dy.local * up, gate, x.grid)
        dx[..., 1, :] = dy.local * self.activation.value(gate, x.grid)
        return x.like(dx)

    @staticmethod
    def _whole_pairs(x: DistArray) -> DistArray:
        """Return x with complete sums and each pair of gate and up on one rank."""
        *leading, _, last = x.layout.dims
        # X[B, S, 2, F_col] {U} -> X[B, S, 2, F_col]: partial sums are reduced, cut pairs are gathered
        return x.redistribute(Layout(*leading, None, last))


class Softmax(Layer):
    """The softmax ``y = exp(x) / sum(exp(x))`` over the last dim, in any layout.

    Notes
    -----
    An empty block has maximum -inf and sum 0. Partial sums are reduced first.

    **Communication:** over the axes that cut the last dim, p ranks and n rows: an allreduce of n maxima and one of n
    sums forward, and one of n sums backward, together ``6 (p - 1) n`` words summed over ranks.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        x = x.reduced()
        xp, grid, axes = backend.namespace(x.local), x.grid, x.layout.dims[-1]
        # X[B, S, V_col] -> max over v: M[B, S], an allreduce (MAX) over col
        top = comm.allreduce(kernels.of(grid).peak(x.local), grid, axes, comm.MAX)
        y = xp.exp(wide(x.local) - wide(top)[..., None])
        # sum over v: T[B, S] {U_col} -> T[B, S]: allreduce over col
        y /= comm.allreduce(xp.sum(y, axis=-1), grid, axes)[..., None]
        y = like(x.local, y)
        return x.like(y), x.like(y)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        y: DistArray = cache
        xp, d, p = backend.namespace(y.local), wide(dy.redistribute(y.layout).local), wide(y.local)
        # dX = y (dY - T), with the sum over v of y dY: T[B, S] {U_col} -> T[B, S], an allreduce over col
        total = comm.allreduce(xp.sum(p * d, axis=-1), y.grid, y.layout.dims[-1])
        return y.like(like(y.local, p * (d - total[..., None])))


ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "gelu-tanh": GELU,
    "gelu": lambda: GELU("none"),
    "gelu-sigmoid": lambda: GELU("sigmoid"),
    "silu": SiLU,
    "relu": ReLU,
    "tanh": Tanh,
}
"""The activations by the names that models give them; "gelu" is the exact one, as in PyTorch."""

GATED = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu-tanh": "gelu-tanh",
    "geglu-sigmoid": "gelu-sigmoid",
    "reglu": "relu",
}
"""The activation of the gate, by the name of each gated form."""
