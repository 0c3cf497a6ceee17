"""Llama: a decoder-only transformer with rotary positions, RMSNorm, grouped queries and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.head import Head
from colossal_mpi.layers.models.experts import mixture
from colossal_mpi.layers.norm import RMSNorm
from colossal_mpi.layers.parallelism import Parallelism


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; by default those of Llama 3 8B."""

    vocabulary: int = 128256
    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    groups: int | None = 8
    """Groups of heads that share keys and values; None: as many as heads."""
    width: int | None = None
    """Width of a head; hidden / heads by default."""
    inner: int = 14336
    """Width of the gated MLP."""
    positions: int = 8192
    """The longest sequence that it is meant for; nothing is stored for each."""
    theta: float = 500000.0
    """Base of the rotary frequencies."""
    scaling: Mapping[str, Any] | None = None
    """Of the rotary frequencies, as `Rotary` takes it."""
    activation: str = "swiglu"
    eps: float = 1e-5
    """Of the norms."""
    bias: bool = False
    """Whether the products of attention have biases."""
    mlp_bias: bool = False
    """Whether those of the MLP have."""
    tied: bool = False
    """Whether the head is the embedding."""
    experts: int = 0
    """MLPs of a mixture of experts in each block; 0: one MLP for all tokens."""
    experts_per_token: int = 2
    """Experts of a token."""
    expert_balance: float = 0.01
    """Coefficient of the loss that balances them."""
    expert_z_loss: float = 0.0
    """Coefficient of the loss that keeps the router's logits small."""
    std: float = 0.02
    """Standard deviation of the initial weights."""
    seed: int | None = 0
    """None makes zeros of random weights, which are to be loaded."""
    dtype: str = "float32"


class Llama(Sequential):
    """Llama (Touvron et al. 2023): token ids ``[b, s]`` to logits ``[b, s, v]``. Mistral's is the same architecture.

    With experts it is Mixtral's (Jiang et al. 2024).

    Parameters
    ----------
    config : LlamaConfig
    parallelism : Parallelism

    References
    ----------
    Touvron et al.: LLaMA, 2023. Llama team: The Llama 3 herd of models, 2024. Jiang et al.: Mistral 7B, 2023.
    """

    def __init__(self, config: LlamaConfig, parallelism: Parallelism) -> None:
        self.config, c = config, config
        common: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        tokens = Embedding(c.vocabulary, c.hidden, parallelism, "tokens", **common)
        rotary = Rotary(c.theta, c.scaling)
        options: dict[str, Any] = {
            "norm": "rms",
            "eps": c.eps,
            "activation": c.activation,
            "bias": c.mlp_bias,
            "attention": {"groups": c.groups, "width": c.width, "rotary": rotary, "bias": c.bias},
            "out_std": c.std,
            "experts": mixture(c),
        }
        super().__init__(
            tokens,
            *[
                TransformerBlock(c.hidden, c.heads, c.inner, parallelism, f"blocks.{i}", **options, **common)
                for i in range(c.layers)
            ],
            RMSNorm(c.hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            Head(
                "bsh,vh->bsv",
                {"v": c.vocabulary, "h": c.hidden},
                "v",
                parallelism,
                "head",
                bias=False,
                weight=tokens.table if c.tied else None,
                **common,
            ),
        )
