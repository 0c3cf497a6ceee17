"""GPT-2: a decoder-only transformer with learned positions and tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding
from colossal_mpi.layers.head import Head
from colossal_mpi.layers.models.experts import mixture
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT."""

    vocabulary: int = 256
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    positions: int = 128
    inner: int | None = None
    """Width of the MLP; 4 x hidden by default."""
    activation: str = "gelu-tanh"
    eps: float = 1e-5
    """Of the norms."""
    tied: bool = True
    """Whether the head is the embedding."""
    dropout: float = 0.0
    """Rate at which elements of the embedded tokens and of what attention and MLP add are dropped."""
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


class GPT(Sequential):
    """GPT-2 (Radford et al. 2019), its head tied to the embedding or not: token ids ``[b, s]`` to logits ``[b, s, v]``.

    Parameters
    ----------
    config : GPTConfig
    parallelism : Parallelism

    Notes
    -----
    Initial weights are normal with standard deviation `std`, products into the residual stream scaled by
    ``1 / sqrt(2 layers)``; they are a function of seed and name, bitwise the same on every grid.
    """

    def __init__(self, config: GPTConfig, parallelism: Parallelism) -> None:
        self.config, hidden = config, config.hidden
        common: dict[str, Any] = {"std": config.std, "seed": config.seed, "dtype": config.dtype}
        tokens = Embedding(config.vocabulary, hidden, parallelism, "tokens", **common)
        out_std = config.std / math.sqrt(2 * config.layers)
        inner = 4 * hidden if config.inner is None else config.inner
        sizes, shared = {"v": config.vocabulary, "h": hidden}, tokens.table if config.tied else None
        drop, rate = Dropout(config.dropout, "dropout", config.seed or 0), config.dropout
        options = {"eps": config.eps, "activation": config.activation, "dropout": rate, "out_std": out_std, **common}
        options["experts"] = mixture(config)
        super().__init__(
            tokens,
            PositionEmbedding(config.positions, hidden, parallelism, "positions", **common),
            drop,
            *[
                TransformerBlock(hidden, config.heads, inner, parallelism, f"blocks.{i}", **options)
                for i in range(config.layers)
            ],
            LayerNorm(hidden, parallelism, "norm", eps=config.eps, dtype=config.dtype),
            Head("bsh,vh->bsv", sizes, "v", parallelism, "head", bias=False, weight=shared, **common),
        )
