"""GPT-2: a decoder-only transformer with learned positions and tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding
from colossal_mpi.layers.layer import Chain
from colossal_mpi.layers.linear import Linear
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
    seed: int | None = 0
    """None makes zeros of random weights, which are to be loaded."""
    dtype: str = "float32"


class GPT(Chain):
    """GPT-2 (Radford et al. 2019), its head tied to the embedding or not: token ids ``[b, s]`` to logits ``[b, s, v]``.

    Parameters
    ----------
    config : GPTConfig
    parallelism : Parallelism

    Notes
    -----
    Initial weights are normal with standard deviation 0.02, products into the residual stream scaled by
    ``1 / sqrt(2 layers)``; they are a function of seed and name, bitwise the same on every grid.
    """

    def __init__(self, config: GPTConfig, parallelism: Parallelism) -> None:
        self.config, hidden = config, config.hidden
        common: dict[str, Any] = {"seed": config.seed, "dtype": config.dtype}
        tokens = Embedding(config.vocabulary, hidden, parallelism, "tokens", **common)
        out_std = 0.02 / math.sqrt(2 * config.layers)
        inner = 4 * hidden if config.inner is None else config.inner
        sizes, shared = {"v": config.vocabulary, "h": hidden}, tokens.table if config.tied else None
        drop, rate = Dropout(config.dropout, "dropout", config.seed or 0), config.dropout
        options = {"eps": config.eps, "activation": config.activation, "dropout": rate, "out_std": out_std, **common}
        super().__init__(
            tokens,
            PositionEmbedding(config.positions, hidden, parallelism, "positions", **common),
            drop,
            *[
                TransformerBlock(hidden, config.heads, inner, parallelism, f"blocks.{i}", **options)
                for i in range(config.layers)
            ],
            LayerNorm(hidden, parallelism, "norm", eps=config.eps, dtype=config.dtype),
            Linear("bsh,vh->bsv", sizes, "v", parallelism, "head", bias=False, weight=shared, **common),
        )
