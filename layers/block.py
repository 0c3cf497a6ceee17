"""The transformer block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    """Attention and MLP, each added to the stream: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Parameters
    ----------
    hidden, heads, inner : int
        Width of the stream, number of heads, width of the MLP.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters of ``norm1``, ``attention``, ``norm2`` and ``mlp``.
    order : {"pre", "post"}
        Whether the norms come first in each branch (GPT-2, Llama, ViT) or after each sum, as ``norm(x + mlp(x))``
        (Vaswani et al., BERT).
    norm : {"layer", "rms"}
    eps : float
        Of the norms.
    activation : str
        As `MLP` takes it.
    attention : mapping, optional
        Further options of `SelfAttention`, ``{"causal": False}``.
    experts : mapping, optional
        Options of `MoE`, ``{"experts": 8}``, which then takes the place of the MLP.
    dropout : float
        Rate at which elements of what attention and MLP add are dropped.
    drop_path : float
        Rate at which all that attention or MLP adds to a sample is dropped.
    bias : bool
        Whether the products have biases.
    std, out_std : float
        Standard deviations of the initial weights of the products from the stream and back to it.
    seed, dtype

    Raises
    ------
    OptionError
        If there is no such order, norm or activation.

    References
    ----------
    Vaswani et al.: Attention is all you need, 2017. Radford et al.: Language models are unsupervised multitask
    learners, 2019 (norms first).
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
        seed: int = 0,
        dtype: Any = "float32",
        **common: Any,
    ) -> None:
        if order not in ("pre", "post"):
            raise OptionError(f"{name}: order={order!r}: use 'pre' or 'post'")
        common |= {"seed": seed, "dtype": dtype}

        def branch(number: int, which: str, layer: Layer) -> list[Layer]:
            normal = normalisation(norm, hidden, parallelism, f"{name}.norm{number}", eps=eps, dtype=dtype)
            every = (
                Dropout(dropout, f"{name}.{which}.dropout", seed),
                DropPath(drop_path, f"{name}.{which}.drop_path", seed),
            )
            drops = [drop for drop in every if drop.rate]  # a branch that ends with a product is cheaper to make again
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
