"""The transformer block: attention and MLP, or experts, each with a norm and a residual connection.

The models are sequences of blocks. A block is built of `SelfAttention`, `MLP` or `MoE`, norms and dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import DTypeLike

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.attention.self_attention import SelfAttention
from colossal_mpi.layers.containers import Residual, Sequential
from colossal_mpi.layers.dropout import Dropout, DropPath
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.mlp import MLP
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.norm import normalisation
from colossal_mpi.layers.parallelism import Parallelism


class TransformerBlock(Sequential):
    """Attention and MLP on the residual stream, ``y = x + attention(norm(x))`` and ``z = y + mlp(norm(y))``.

    Parameters
    ----------
    hidden : int
        Width h of the stream.
    heads : int
        Number of heads of queries.
    inner : int
        Width of the MLP, or of each expert.
    parallelism : Parallelism
        The mode, which chooses maps and layouts.
    name : str
        Prefix of the names of the parameters of ``norm1``, ``attention``, ``norm2`` and ``mlp``.
    order : {"pre", "post"}
        Whether a norm stands first in each branch (GPT-2, Llama, ViT) or after each sum, ``norm(x + mlp(x))`` (Vaswani
        et al., BERT).
    norm : {"layer", "rms"}
        `LayerNorm` or `RMSNorm`.
    eps : float
        The number that the norms add to the variance or the mean square.
    activation : str
        Activation of the MLP, a name that `MLP` takes.
    attention : mapping, optional
        Further options of `SelfAttention`, such as ``{"causal": False}``.
    experts : mapping, optional
        Options of `MoE`, such as ``{"experts": 8}``, which then takes the place of the MLP.
    dropout : float
        Rate at which elements of the output of attention and MLP are dropped.
    drop_path : float
        Rate at which the whole output of attention or MLP is dropped for a sample.
    bias : bool, optional
        Whether the products have biases; by default they do, except in experts.
    std : float
        Standard deviation of the initial weights of the products from the stream.
    out_std : float
        Standard deviation of the initial weights of the products back to the stream.
    seed : int
        Seed of the initial weights and of the dropout masks.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If there is no such order, norm or activation.

    Notes
    -----
    **Communication:** the collectives of `SelfAttention`, of `MLP` or `MoE`, and of the norms. The design notes state
    the words of a block in every mode.

    References
    ----------
    Vaswani et al.: Attention is all you need, 2017. Radford et al.: Language models are unsupervised multitask
    learners, 2019 (norms first).

    Examples
    --------
    >>> TransformerBlock(768, 12, 3072, Parallelism(Grid(row=2, col=2), "2d"), "block")
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        inner: int,
        parallelism: Parallelism,
        name: str,
        *,
        order: str = "pre",
        norm: str = "layer",
        eps: float = 1e-5,
        activation: str = "gelu-tanh",
        attention: Mapping[str, Any] | None = None,
        experts: Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        bias: bool | None = None,
        std: float = 0.02,
        out_std: float = 0.02,
        seed: int = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        if order not in ("pre", "post"):
            raise OptionError(f"{name}: order={order!r}: use 'pre' or 'post'")
        common: dict[str, Any] = {"std": std, "out_std": out_std, "seed": seed, "dtype": dtype}
        common |= {} if bias is None else {"bias": bias}

        def branch(number: int, which: str, layer: Layer) -> list[Layer]:
            normal = normalisation(norm, hidden, parallelism, f"{name}.norm{number}", eps=eps, dtype=dtype)
            every = (
                Dropout(dropout, f"{name}.{which}.dropout", seed),
                DropPath(drop_path, f"{name}.{which}.drop_path", seed),
            )
            # Dropout of rate 0 is left out: recomputation of a branch that ends with a product can skip that product.
            drops = [drop for drop in every if drop.rate]
            if order == "pre":
                return [Residual(normal, layer, *drops)]
            return [Residual(layer, *drops), normal]

        options = {**common, **(attention or {})}
        mlp = MLP if experts is None else MoE
        inside = {**common, "activation": activation, **(experts or {})}
        super().__init__(
            *branch(1, "attention", SelfAttention(hidden, heads, parallelism, f"{name}.attention", **options)),
            *branch(2, "mlp", mlp(hidden, inner, parallelism=parallelism, name=f"{name}.mlp", **inside)),
        )
