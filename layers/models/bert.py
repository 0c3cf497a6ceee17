"""BERT: an encoder that is trained to fill in masked tokens and to tell whether one sentence follows another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colossal_mpi.layers.activation import ACTIVATIONS, Tanh
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import FanOut, Sequential
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding, SegmentEmbedding
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.pooling import FirstPool


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT; by default those of BERT-base."""

    vocabulary: int = 30522
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    positions: int = 512
    segments: int = 2
    """Kinds of segments: the two sentences."""
    inner: int | None = None
    """Width of the MLP; 4 x hidden by default."""
    activation: str = "gelu"
    eps: float = 1e-12
    """Of the norms."""
    tied: bool = True
    """Whether the product with the vocabulary is the embedding."""
    next_sentence: bool = True
    """Whether there is a head for the next sentence; without it the output is that of the masked tokens alone."""
    dropout: float = 0.0
    """Rate at which elements of the embedded tokens and of what attention and MLP add are dropped."""
    std: float = 0.02
    """Standard deviation of the initial weights."""
    seed: int | None = 0
    """None makes zeros of random weights, which are to be loaded."""
    dtype: str = "float32"


class Bert(Sequential):
    """BERT with the heads that it is pre-trained with: token ids ``[b, s]`` to two arrays of logits.

    `forward` returns the logits ``[b, s, v]`` of the masked tokens and ``[b, 2]`` of whether the second segment follows
    the first (0: it does), as a tuple; `backward` takes a tuple of their cotangents, of which one may be None, where
    the loss does not take it. Without ``next_sentence`` both are one array. The context's `segments` say which tokens
    are of which sentence, its `mask` which are none.

    Parameters
    ----------
    config : BertConfig
    parallelism : Parallelism

    Notes
    -----
    The blocks have their norms after the sums and see all positions. The pooler and the first product of the masked
    tokens' head go from the stream to the stream: as products down, of which the stream is the inside.

    References
    ----------
    Devlin et al.: BERT: pre-training of deep bidirectional transformers for language understanding, 2019.
    """

    def __init__(self, config: BertConfig, parallelism: Parallelism) -> None:
        c, hidden = config, config.hidden
        self.config, inner = c, 4 * hidden if c.inner is None else c.inner
        common: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        options: dict[str, Any] = {"eps": c.eps, "activation": c.activation, "dropout": c.dropout, "out_std": c.std}
        tokens = Embedding(c.vocabulary, hidden, parallelism, "tokens", **common)
        blocks = [
            TransformerBlock(
                hidden,
                c.heads,
                inner,
                parallelism,
                f"blocks.{i}",
                order="post",
                attention={"causal": False},
                **options,
                **common,
            )
            for i in range(c.layers)
        ]
        masked = _masked_tokens(c, parallelism, tokens, common)
        super().__init__(
            tokens,
            SegmentEmbedding(c.segments, hidden, parallelism, "segments", **common),
            PositionEmbedding(c.positions, hidden, parallelism, "positions", **common),
            LayerNorm(hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            Dropout(c.dropout, "dropout", c.seed or 0),
            *blocks,
            FanOut(masked, _next_sentence(c, parallelism, common)) if c.next_sentence else masked,
        )


def _masked_tokens(c: BertConfig, p: Parallelism, tokens: Embedding, common: dict[str, Any]) -> Layer:
    sizes = {"h": c.hidden, "f": c.hidden, "v": c.vocabulary}
    words: dict[str, Any] = {"name": "predictions", "weight": tokens.table} if c.tied else {"name": "decoder"}
    return Sequential(
        Linear("bsf,fh->bsh", sizes, "f", p, "predictions.dense", **common),
        ACTIVATIONS[c.activation](),
        LayerNorm(c.hidden, p, "predictions.norm", eps=c.eps, dtype=c.dtype),
        Linear("bsh,vh->bsv", sizes, "v", p, **words, **common),
    )


def _next_sentence(c: BertConfig, p: Parallelism, common: dict[str, Any]) -> Layer:
    sizes = {"h": c.hidden, "f": c.hidden, "v": 2}
    return Sequential(
        FirstPool(p),
        Linear("bf,fh->bh", sizes, "f", p, "pooler", **common),
        Tanh(),
        Linear("bh,hv->bv", sizes, "v", p, "next_sentence", **common),
    )
