"""The transformer block and its parts between attention and stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.activation import ACTIVATIONS, GATED, Gated
from colossal_mpi.layers.attention import SelfAttention
from colossal_mpi.layers.dropout import Dropout, DropPath
from colossal_mpi.layers.layer import Chain, Layer, Residual
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import normalisation
from colossal_mpi.layers.parallelism import Parallelism


class MLP(Chain):
    """Two products with an activation between them, ``[b, s, h]`` to ``[b, s, f]`` and back.

    Parameters
    ----------
    hidden, inner : int
        h and f.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters of ``up`` and ``down``.
    activation : str
        One of `ACTIVATIONS`, or of `GATED`, whose weight up is ``[h, 2, f]``: of the gate and of what it lets through.
    std, out_std : float
        Standard deviations of the initial weights up and down.
    **common
        ``bias``, ``seed`` and ``dtype``, as `Linear` takes them.

    Raises
    ------
    OptionError
        If there is no such activation.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        parallelism: Parallelism,
        name: str,
        *,
        activation: str = "gelu-tanh",
        std: float = 0.02,
        out_std: float = 0.02,
        **common: Any,
    ) -> None:
        if activation not in (*ACTIVATIONS, *GATED):
            fitting = ", ".join(map(repr, (*ACTIVATIONS, *GATED)))
            raise OptionError(f"{name}: activation={activation!r}: use one of {fitting}")
        function, gated = ACTIVATIONS[GATED.get(activation, activation)](), activation in GATED
        sizes, up = {"h": hidden, "f": inner, "t": 2}, "bsh,htf->bstf" if gated else "bsh,hf->bsf"
        super().__init__(
            Linear(up, sizes, "f", parallelism, f"{name}.up", std=std, **common),
            Gated(function) if gated else function,
            Linear("bsf,fh->bsh", sizes, "f", parallelism, f"{name}.down", std=out_std, **common),
        )


class TransformerBlock(Chain):
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
            drops = (
                Dropout(dropout, f"{name}.{which}.dropout", seed),
                DropPath(drop_path, f"{name}.{which}.drop_path", seed),
            )
            if order == "pre":
                return [Residual(normal, layer, *drops)]
            return [Residual(layer, *drops), normal]

        options = {**common, **(attention or {})}
        super().__init__(
            *branch(1, "attention", SelfAttention(hidden, heads, parallelism, f"{name}.attention", **options)),
            *branch(2, "mlp", MLP(hidden, inner, parallelism, f"{name}.mlp", activation=activation, **common)),
        )
