"""The MLP of a transformer block: two products with an activation between them, for tokens or for experts.

Transformer blocks and `MoE` build it from `Linear` and an activation.
"""

from __future__ import annotations

from numpy.typing import DTypeLike

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.activation import ACTIVATIONS, GATED, Gated
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism


class MLP(Sequential):
    """The feed-forward layer of the residual stream, ``y = activation(x up) down``, ``[b, s, h]`` to ``[b, s, h]``.

    Parameters
    ----------
    hidden : int
        Width h of the stream.
    inner : int
        Width f between the two products.
    parallelism : Parallelism
        The mode, which chooses maps and layouts; for experts it is `Parallelism.experts`.
    name : str
        Prefix of the names of the parameters ``up.weight [h, f]``, ``up.bias [f]``, ``down.weight [f, h]`` and
        ``down.bias [h]``.
    activation : str
        A name in `ACTIVATIONS`, or in `GATED`: then ``up.weight`` is ``[h, 2, f]``, for the gate and for the values
        that the gate multiplies.
    experts : int, optional
        Number e of MLPs side by side: they take slots ``[e, p, c, h]`` instead of tokens, and their weights and biases
        have a first dim e.
    std : float
        Standard deviation of the initial weight up.
    out_std : float
        Standard deviation of the initial weight down.
    bias : bool
        Whether the products have biases.
    seed : int, optional
        Seed of the initial weights; None leaves them zero, for weights that are to be loaded.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If there is no such activation.

    Notes
    -----
    **Communication:** the collectives of the two products (`Linear`).

    Examples
    --------
    >>> MLP(768, 3072, Parallelism(Grid(col=4), "1d"), "mlp", activation="swiglu", bias=False)
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        parallelism: Parallelism,
        name: str,
        *,
        activation: str = "gelu-tanh",
        experts: int | None = None,
        std: float = 0.02,
        out_std: float = 0.02,
        bias: bool = True,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        if activation not in (*ACTIVATIONS, *GATED):
            fitting = ", ".join(map(repr, (*ACTIVATIONS, *GATED)))
            raise OptionError(f"{name}: activation={activation!r}: use one of {fitting}")
        function, gated = ACTIVATIONS[GATED.get(activation, activation)](), activation in GATED
        # "bsh,hf->bsf" and "bsf,fh->bsh"; gated "bsh,htf->bstf"; of experts "epch,ehf->epcf" and "epcf,efh->epch"
        (tokens, each), pair = ("bs", "") if experts is None else ("epc", "e"), "t" if gated else ""
        sizes = {"e": experts or 1, "h": hidden, "f": inner, "t": 2}
        up, down = f"{tokens}h,{each}h{pair}f->{tokens}{pair}f", f"{tokens}f,{each}fh->{tokens}h"
        super().__init__(
            Linear(up, sizes, "f", parallelism, f"{name}.up", bias=bias, std=std, seed=seed, dtype=dtype),
            Gated(function) if gated else function,
            Linear(down, sizes, "f", parallelism, f"{name}.down", bias=bias, std=out_std, seed=seed, dtype=dtype),
        )
