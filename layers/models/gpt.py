"""GPT-2: a decoder-only transformer with learned positions and a tied head, and its mapping onto ``gpt2`` directories.

``apps`` trains it, and checkpoints and `from_pretrained` find it in the registry. It is a chain of layers: nothing here
communicates or knows the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding
from colossal_mpi.layers.head import Head
from colossal_mpi.layers.models.huggingface.architecture import (
    ACTIVATIONS,
    Architecture,
    ConfigKey,
    boolean,
    fixed,
    integer,
    linear,
    norm,
    optional_integer,
    real,
    tensor,
)
from colossal_mpi.layers.models.registry import register_model
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism


@dataclass(frozen=True)
class GPTConfig:
    """The configuration of a `GPT`.

    Parameters
    ----------
    vocabulary : int
        Number of tokens.
    layers : int
        Number of blocks.
    hidden : int
        Width of the residual stream.
    heads : int
        Attention heads in each block; must divide `hidden`.
    positions : int
        The longest sequence, in tokens.
    inner : int, optional
        Width of the MLP; ``4 hidden`` by default.
    activation : str
        Activation of the MLP.
    eps : float
        Added to the variance in the norms.
    tied : bool
        Whether the head multiplies with the embedding table.
    dropout : float
        Rate at which elements of the embedded tokens and of the outputs of attention and MLP are dropped.
    experts : int
        Experts of the mixture that replaces each MLP; 0 keeps one MLP for all tokens.
    experts_per_token : int
        Experts that each token is routed to.
    expert_balance : float
        Coefficient of the loss that balances the experts.
    expert_balance_over : str
        The tokens over which this loss is formed: ``"sequence"`` or ``"microbatch"``, see `MoE`.
    expert_z_loss : float
        Coefficient of the loss that keeps the router's logits small.
    std : float
        Standard deviation of the initial weights.
    seed : int or None
        Seed of the initial weights; None makes zeros, for weights that are loaded afterwards.
    dtype : str
        Dtype of the weights.
    """

    vocabulary: int = 256
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    positions: int = 128
    inner: int | None = None
    activation: str = "gelu-tanh"
    eps: float = 1e-5
    tied: bool = True
    dropout: float = 0.0
    experts: int = 0
    experts_per_token: int = 2
    expert_balance: float = 0.01
    expert_balance_over: str = "sequence"
    expert_z_loss: float = 0.0
    std: float = 0.02
    seed: int | None = 0
    dtype: str = "float32"


_BLOCK = "transformer.h.{i}"

# GPT-2 stores the matrices of ``x W`` as we do: none is transposed.
GPT2 = Architecture(
    model_type="gpt2",
    classes=("GPT2LMHeadModel",),
    base="transformer",
    keys=(
        integer("vocab_size", "vocabulary", 50257),
        integer("n_positions", "positions", 1024),
        integer("n_embd", "hidden", 768),
        integer("n_layer", "layers", 12),
        integer("n_head", "heads", 12),
        optional_integer("n_inner", "inner", None),
        real("layer_norm_epsilon", "eps", 1e-5),
        boolean("tie_word_embeddings", "tied", True),
        ConfigKey("activation_function", "activation", "gelu_new", ACTIVATIONS),
        fixed("scale_attn_weights", True, True),
        fixed("scale_attn_by_inverse_layer_idx", False, False),
        fixed("add_cross_attention", False, False),
    ),
    weights=(
        tensor("tokens.weight", "vh", "transformer.wte.weight"),
        tensor("positions.weight", "ph", "transformer.wpe.weight"),
        *norm("blocks.{i}.norm1", f"{_BLOCK}.ln_1"),
        *linear("blocks.{i}.attention.qkv", "htad", [f"{_BLOCK}.attn.c_attn"], "h(tad)"),
        *linear("blocks.{i}.attention.out", "adh", [f"{_BLOCK}.attn.c_proj"], "(ad)h", "ad"),
        *norm("blocks.{i}.norm2", f"{_BLOCK}.ln_2"),
        *linear("blocks.{i}.mlp.up", "hf", [f"{_BLOCK}.mlp.c_fc"], "hf"),
        *linear("blocks.{i}.mlp.down", "fh", [f"{_BLOCK}.mlp.c_proj"], "fh", "f"),
        *norm("norm", "transformer.ln_f"),
        tensor("head.weight", "vh", "lm_head.weight"),
    ),
    ignored=("*.attn.bias", "*.attn.masked_bias"),  # the causal mask, which older versions stored
    tied={"transformer.wte.weight": "lm_head.weight"},
)


@register_model("gpt", GPTConfig, task="language", huggingface=[GPT2])
class GPT(Sequential):
    """GPT-2: token ids ``[b, s]`` to logits ``[b, s, v]``.

    Parameters
    ----------
    config : GPTConfig
        Sizes, initial weights and dtype.
    parallelism : Parallelism
        The grid and the tensor mode.

    Notes
    -----
    The initial weights are normal with standard deviation `std`; weights of products into the residual stream are
    scaled by ``1 / sqrt(2 layers)``. They depend on seed and name alone and are bitwise the same on every grid.

    References
    ----------
    Radford et al.: Language models are unsupervised multitask learners, 2019.

    Examples
    --------
    >>> model = GPT(GPTConfig(vocabulary=256, layers=2), Parallelism(Grid(row=2, col=2), "2d"))
    """

    def __init__(self, config: GPTConfig, parallelism: Parallelism) -> None:
        self.config, c, hidden = config, config, config.hidden
        initial: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        tokens = Embedding(c.vocabulary, hidden, parallelism, "tokens", **initial)
        inner = 4 * hidden if c.inner is None else c.inner
        sizes, shared = {"v": c.vocabulary, "h": hidden}, tokens.table if c.tied else None
        balancing = c.expert_balance, c.expert_balance_over, c.expert_z_loss
        experts = expert_options(c.experts, c.experts_per_token, *balancing)
        super().__init__(
            tokens,
            PositionEmbedding(c.positions, hidden, parallelism, "positions", **initial),
            Dropout(c.dropout, "dropout", c.seed or 0),
            *[
                TransformerBlock(
                    hidden,
                    c.heads,
                    inner,
                    parallelism,
                    f"blocks.{i}",
                    eps=c.eps,
                    activation=c.activation,
                    dropout=c.dropout,
                    out_std=c.std / math.sqrt(2 * c.layers),
                    experts=experts,
                    **initial,
                )
                for i in range(c.layers)
            ],
            LayerNorm(hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            Head("bsh,vh->bsv", sizes, "v", parallelism, "head", bias=False, weight=shared, **initial),
        )


def expert_options(
    experts: int, per_token: int, balance: float, balance_over: str, z_loss: float, renormalise: bool | None = None
) -> dict[str, Any] | None:
    """Return the options of `MoE` in each block.

    Parameters
    ----------
    experts : int
        Number of experts of each block; 0: none.
    per_token : int
        Experts that each token is routed to.
    balance : float
        Coefficient of the loss that balances the experts.
    balance_over : str
        The tokens over which this loss is formed.
    z_loss : float
        Coefficient of the loss that keeps the router's logits small.
    renormalise : bool, optional
        Whether the weights of a token's experts are scaled to the sum 1, see `MoE`.

    Returns
    -------
    dict or None
        Keyword arguments of `MoE`, None if there are no experts.
    """
    options = {"experts": experts, "top_k": per_token, "balance": balance, "balance_over": balance_over}
    return {**options, "z_loss": z_loss, "renormalise": renormalise} if experts else None
