"""GPT-2: a decoder-only transformer with learned positions and tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.block import Block
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding
from colossal_mpi.layers.layer import Context, Later, Layer
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
    seed: int = 0
    dtype: str = "float32"


class GPT(Layer):
    """GPT-2 (Radford et al. 2019) with tied input and output embeddings.

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
        self.tokens = Embedding(config.vocabulary, hidden, parallelism, "tokens", **common)
        self.positions = PositionEmbedding(config.positions, hidden, parallelism, "positions", **common)
        out_std = 0.02 / math.sqrt(2 * config.layers)
        inner = config.inner or 4 * hidden
        self.blocks = [
            Block(hidden, config.heads, inner, parallelism, f"blocks.{i}", out_std=out_std, **common)
            for i in range(config.layers)
        ]
        self.norm = LayerNorm(hidden, parallelism, "norm", dtype=config.dtype)
        self.head = Linear(
            "bsh,vh->bsv",
            {"v": config.vocabulary, "h": hidden},
            "v",
            parallelism,
            "head",
            bias=False,
            weight=self.tokens.table,
        )
        self.layers: list[Layer] = [self.tokens, self.positions, *self.blocks, self.norm, self.head]

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the logits ``[b, s, v]`` of token ids ``[b, s]``."""
        caches = []
        for layer in self.layers:
            x, cache = layer.forward(x, ctx)
            caches.append(cache)
        return x, caches

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> None:
        """Take the cotangent of the logits to the gradients of all parameters."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy, cache.pop(), later)
