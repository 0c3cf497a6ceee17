"""BERT: an encoder that fills in masked tokens and predicts the next sentence, and its Hugging Face mapping.

``apps`` trains it, and checkpoints and `from_pretrained` find it in the registry. `ViT` reuses the mapping of its
blocks onto Hugging Face directories. It is a chain of layers: nothing here communicates or knows the grid.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from colossal_mpi.errors import ConfigError, OptionError
from colossal_mpi.layers.activation import ACTIVATIONS, Tanh
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import FanOut, Sequential
from colossal_mpi.layers.dropout import Dropout
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding, SegmentEmbedding
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.models.huggingface import architecture as hf
from colossal_mpi.layers.models.registry import register_model
from colossal_mpi.layers.norm import LayerNorm
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.pooling import FirstPool


@dataclass(frozen=True)
class BertConfig:
    """The configuration of a `Bert`; the defaults are the sizes of BERT-base.

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
    segments : int
        Number of segments that a sequence may have: two, one for each sentence.
    inner : int, optional
        Width of the MLP; ``4 hidden`` by default.
    activation : str
        Activation of the MLP and of the head for masked tokens.
    eps : float
        Added to the variance in the norms.
    tied : bool
        Whether the head for masked tokens multiplies with the embedding table.
    next_sentence : bool
        Whether the model has a head for the next sentence. Without it the output is the logits of the tokens alone.
    head : {"pretraining", "classes", "none"}
        ``"pretraining"`` has the head for masked tokens and, with `next_sentence`, the one for the next sentence;
        ``"classes"`` classifies the sequence by its first token; ``"none"`` returns the stream of the last block.
    classes : int
        Number of classes that the head ``"classes"`` tells apart.
    dropout : float
        Rate at which elements of the embedded tokens and of the outputs of attention and MLP are dropped.
    std : float
        Standard deviation of the initial weights.
    seed : int or None
        Seed of the initial weights; None makes zeros, for weights that are loaded afterwards.
    dtype : str
        Dtype of the weights.
    """

    vocabulary: int = 30522
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    positions: int = 512
    segments: int = 2
    inner: int | None = None
    activation: str = "gelu"
    eps: float = 1e-12
    tied: bool = True
    next_sentence: bool = True
    head: str = "pretraining"
    classes: int = 2
    dropout: float = 0.0
    std: float = 0.02
    seed: int | None = 0
    dtype: str = "float32"


def block_keys() -> tuple[hf.ConfigKey, ...]:
    """Return the keys of ``config.json`` for the blocks of BERT and ViT."""
    return (
        hf.integer("num_hidden_layers", "layers", 12),
        hf.integer("hidden_size", "hidden", 768),
        hf.integer("num_attention_heads", "heads", 12),
        hf.integer("intermediate_size", "inner", 3072, missing=lambda config: 4 * config.hidden),
        hf.ConfigKey("hidden_act", "activation", "gelu", hf.ACTIVATIONS),
        hf.real("layer_norm_eps", "eps", 1e-12),
    )


def block_weights(prefix: str, attention: str, norms: tuple[str, str]) -> tuple[hf.WeightMap, ...]:
    """Return the maps of the weights in the blocks of BERT and ViT; the matrices of torch.nn.Linear are transposed."""
    qkv = [f"{prefix}.attention.{attention}.{which}" for which in ("query", "key", "value")]
    return (
        *hf.linear("blocks.{i}.attention.qkv", "htad", qkv, "(ad)h"),
        *hf.linear("blocks.{i}.attention.out", "adh", [f"{prefix}.attention.output.dense"], "h(ad)", "ad"),
        *hf.norm("blocks.{i}.norm1", f"{prefix}.{norms[0]}"),
        *hf.linear("blocks.{i}.mlp.up", "hf", [f"{prefix}.intermediate.dense"], "fh"),
        *hf.linear("blocks.{i}.mlp.down", "fh", [f"{prefix}.output.dense"], "hf", "f"),
        *hf.norm("blocks.{i}.norm2", f"{prefix}.{norms[1]}"),
    )


_BODY, _BLOCK, _HEAD = "bert.embeddings", "bert.encoder.layer.{i}", "cls.predictions"
_HEADS: dict[str, hf.Table] = {
    "BertForPreTraining": {"head": "pretraining", "next_sentence": True},
    "BertForMaskedLM": {"head": "pretraining", "next_sentence": False},
    "BertForSequenceClassification": {"head": "classes", "next_sentence": True},
    "BertModel": {"head": "none", "next_sentence": True},
}
"""The keys of the head of each class of transformers."""


def _normalize(table: hf.Table) -> hf.Table:
    return table | {"labels": hf.count_labels(table)}


def _choose(table: hf.Table, names: Container[str]) -> hf.Table:
    """Add the keys of the head of the first class that the table names or, if it names none, of the tensors."""
    named = table.get("architectures") or []
    known = [name for name in named if name in _HEADS]
    if named and not known:
        raise ConfigError(f"architectures={named!r} cannot be run: one must be {' or '.join(map(repr, _HEADS))}")
    if not known:
        classifies = "classifier.weight" in names and "bert.pooler.dense.weight" in names
        known = ["BertForSequenceClassification"] if classifies else ["BertModel"]
    if not named and f"{_HEAD}.transform.dense.weight" in names:
        known = ["BertForPreTraining"] if "cls.seq_relationship.weight" in names else ["BertForMaskedLM"]
    return table | _HEADS[known[0]]


def _denormalize(table: hf.Table, extra: hf.Table) -> hf.Table:
    keys, labels = {key: table.pop(key) for key in ("head", "next_sentence")}, table.pop("labels")
    if keys["head"] != "pretraining":
        keys["next_sentence"] = True  # it does not matter to the other heads
    name = next(name for name, theirs in _HEADS.items() if theirs == keys)
    return table | {"architectures": [name]} | (hf.label_names(labels, extra) if keys["head"] == "classes" else {})


BERT = hf.Architecture(
    model_type="bert",
    classes=tuple(_HEADS),
    base="bert",
    keys=(
        hf.integer("vocab_size", "vocabulary", 30522),
        hf.integer("max_position_embeddings", "positions", 512),
        hf.integer("type_vocab_size", "segments", 2),
        *block_keys(),
        hf.boolean("tie_word_embeddings", "tied", True),
        hf.ConfigKey("head", "head", "pretraining", {head: head for head in ("pretraining", "classes", "none")}),
        hf.boolean("next_sentence", "next_sentence", True),
        hf.integer("labels", "classes", 2),
        hf.fixed("position_embedding_type", "absolute", "absolute"),
        hf.fixed("is_decoder", False, False),
        hf.fixed("add_cross_attention", False, False),
    ),
    weights=(
        hf.tensor("tokens.weight", "vh", f"{_BODY}.word_embeddings.weight"),
        hf.tensor("segments.weight", "sh", f"{_BODY}.token_type_embeddings.weight"),
        hf.tensor("positions.weight", "ph", f"{_BODY}.position_embeddings.weight"),
        *hf.norm("norm", f"{_BODY}.LayerNorm"),
        *block_weights(_BLOCK, "self", ("attention.output.LayerNorm", "output.LayerNorm")),
        *hf.linear("predictions.dense", "fh", [f"{_HEAD}.transform.dense"], "hf", "f"),
        *hf.norm("predictions.norm", f"{_HEAD}.transform.LayerNorm"),
        hf.tensor("predictions.bias", "v", f"{_HEAD}.bias"),
        *hf.linear("decoder", "vh", [f"{_HEAD}.decoder"], "vh"),
        *hf.linear("pooler", "fh", ["bert.pooler.dense"], "hf", "f"),
        *hf.linear("next_sentence", "hv", ["cls.seq_relationship"], "vh"),
        *hf.linear("classifier", "hv", ["classifier"], "vh"),
    ),
    normalize=_normalize,
    choose=_choose,
    denormalize=_denormalize,
    ignored=(f"{_HEAD}.bias", "*position_ids"),  # a bias that an untied decoder does not use, and indices
    tied={f"{_BODY}.word_embeddings.weight": f"{_HEAD}.decoder.weight", f"{_HEAD}.bias": f"{_HEAD}.decoder.bias"},
    doubled={f"{_HEAD}.decoder.bias": f"{_HEAD}.bias"},  # one parameter in older versions
)


@register_model("bert", BertConfig, task="masked", huggingface=[BERT])
class Bert(Sequential):
    """BERT with the heads that it is pre-trained with: token ids ``[b, s]`` to two arrays of logits.

    `forward` returns a tuple: the logits ``[b, s, v]`` of the masked tokens and the logits ``[b, 2]`` that say whether
    the second segment follows the first (index 0: it does). `backward` takes a tuple of their cotangents, one of which
    may be None if the loss does not use that output. Without ``next_sentence``, output and cotangent are single arrays.
    So they are with another `head`: the logits ``[b, v]`` of v classes, or the stream ``[b, s, h]`` of the last block.
    The context's `segments` assign tokens to sentences, its `mask` marks padding.

    Parameters
    ----------
    config : BertConfig
        Sizes, initial weights and dtype.
    parallelism : Parallelism
        The grid and the tensor mode.

    Raises
    ------
    OptionError
        If there is no such head or activation.

    Notes
    -----
    With the heads of pre-training the model is Hugging Face's ``BertForPreTraining`` or ``BertForMaskedLM``, with
    classes its ``BertForSequenceClassification``, without a head its ``BertModel`` without the pooler.

    The blocks normalise after the residual sums, and every position attends to all others. The pooler and the first
    product of the head for masked tokens map the residual stream to itself; they run as the down-projection of a block.

    References
    ----------
    Devlin et al.: BERT: pre-training of deep bidirectional transformers for language understanding, 2019.

    Examples
    --------
    >>> model = Bert(BertConfig(layers=2, hidden=128, heads=4), Parallelism(Grid(row=2, col=2), "2d"))
    """

    def __init__(self, config: BertConfig, parallelism: Parallelism) -> None:
        self.config, c, hidden = config, config, config.hidden
        initial: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        inner = 4 * hidden if c.inner is None else c.inner
        tokens = Embedding(c.vocabulary, hidden, parallelism, "tokens", **initial)
        super().__init__(
            tokens,
            SegmentEmbedding(c.segments, hidden, parallelism, "segments", **initial),
            PositionEmbedding(c.positions, hidden, parallelism, "positions", **initial),
            LayerNorm(hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            Dropout(c.dropout, "dropout", c.seed or 0),
            *[
                TransformerBlock(
                    hidden,
                    c.heads,
                    inner,
                    parallelism,
                    f"blocks.{i}",
                    order="post",
                    attention={"causal": False},
                    eps=c.eps,
                    activation=c.activation,
                    dropout=c.dropout,
                    out_std=c.std,
                    **initial,
                )
                for i in range(c.layers)
            ],
            *_heads(c, parallelism, tokens, initial),
        )


def _heads(c: BertConfig, p: Parallelism, tokens: Embedding, initial: dict[str, Any]) -> list[Layer]:
    """Return the layer after the blocks, or none."""
    if c.head not in ("pretraining", "classes", "none"):
        raise OptionError(f"a Bert of head={c.head!r}: use 'pretraining', 'classes' or 'none'")
    if c.head == "none":
        return []
    if c.head == "classes":
        return [_pooled_head(c, p, "classifier", c.classes, initial)]
    predictions = _prediction_head(c, p, tokens, initial)
    return [FanOut(predictions, _pooled_head(c, p, "next_sentence", 2, initial)) if c.next_sentence else predictions]


def _prediction_head(c: BertConfig, p: Parallelism, tokens: Embedding, initial: dict[str, Any]) -> Layer:
    """Return the head for masked tokens: x[b, s, h] to logits[b, s, v]."""
    sizes = {"h": c.hidden, "f": c.hidden, "v": c.vocabulary}
    name, table = ("predictions", tokens.table) if c.tied else ("decoder", None)
    return Sequential(
        Linear("bsf,fh->bsh", sizes, "f", p, "predictions.dense", **initial),
        ACTIVATIONS[c.activation](),
        LayerNorm(c.hidden, p, "predictions.norm", eps=c.eps, dtype=c.dtype),
        Linear("bsh,vh->bsv", sizes, "v", p, name, weight=table, **initial),
    )


def _pooled_head(c: BertConfig, p: Parallelism, name: str, classes: int, initial: dict[str, Any]) -> Layer:
    """Return the head for the next sentence or for classes: x[b, s, h] to logits[b, v], from the first token."""
    sizes = {"h": c.hidden, "f": c.hidden, "v": classes}
    return Sequential(
        FirstPool(p),
        Linear("bf,fh->bh", sizes, "f", p, "pooler", replicate="s", **initial),
        Tanh(),
        Linear("bh,hv->bv", sizes, "v", p, name, replicate="s", **initial),
    )
