"""BERT's directories, pre-training heads included, and what they share with ViT's."""

from __future__ import annotations

from colossal_mpi.layers.models.huggingface.architecture import (
    ACTIVATIONS,
    Architecture,
    Key,
    Table,
    fixed,
    flag,
    real,
    whole,
)
from colossal_mpi.layers.models.huggingface.axes import Entry, linear, norm, one

_BODY, _BLOCK, _HEAD = "bert.embeddings", "bert.encoder.layer.{i}", "cls.predictions"


def sizes(layers: int = 12, hidden: int = 768, heads: int = 12, inner: int = 3072) -> tuple[Key, ...]:
    """Return the keys of a BERT's blocks."""
    return (
        whole("num_hidden_layers", "layers", layers),
        whole("hidden_size", "hidden", hidden),
        whole("num_attention_heads", "heads", heads),
        whole("intermediate_size", "inner", inner, missing=lambda config: 4 * config.hidden),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        real("layer_norm_eps", "eps", 1e-12),
    )


def blocks(prefix: str, attention: str, norms: tuple[str, str]) -> tuple[Entry, ...]:
    """Return the entries of a BERT's blocks, whose matrices are those of `torch.nn.Linear`: transposed."""
    qkv = [f"{prefix}.attention.{attention}.{which}" for which in ("query", "key", "value")]
    return (
        *linear("blocks.{i}.attention.qkv", "htad", qkv, "(ad)h"),
        *linear("blocks.{i}.attention.out", "adh", [f"{prefix}.attention.output.dense"], "h(ad)", "ad"),
        *norm("blocks.{i}.norm1", f"{prefix}.{norms[0]}"),
        *linear("blocks.{i}.mlp.up", "hf", [f"{prefix}.intermediate.dense"], "fh"),
        *linear("blocks.{i}.mlp.down", "fh", [f"{prefix}.output.dense"], "hf", "f"),
        *norm("blocks.{i}.norm2", f"{prefix}.{norms[1]}"),
    )


_CLASSES = {True: "BertForPreTraining", False: "BertForMaskedLM"}


def _normal(table: Table) -> Table:
    named = table.get("architectures") or [_CLASSES[True]]
    return table | {"next_sentence": _CLASSES[False] not in named}


def _spelled(table: Table, extra: Table) -> Table:
    pooled = table.pop("next_sentence")
    return table | {"architectures": [_CLASSES[pooled]]}


BERT = Architecture(
    name="bert",
    classes=tuple(_CLASSES.values()),
    base="bert",
    keys=(
        whole("vocab_size", "vocabulary", 30522),
        whole("max_position_embeddings", "positions", 512),
        whole("type_vocab_size", "segments", 2),
        *sizes(),
        flag("tie_word_embeddings", "tied", True),
        flag("next_sentence", "next_sentence", True),
        fixed("position_embedding_type", "absolute", "absolute"),
        fixed("is_decoder", False, False),
        fixed("add_cross_attention", False, False),
    ),
    entries=(
        one("tokens.weight", "vh", f"{_BODY}.word_embeddings.weight"),
        one("segments.weight", "sh", f"{_BODY}.token_type_embeddings.weight"),
        one("positions.weight", "ph", f"{_BODY}.position_embeddings.weight"),
        *norm("norm", f"{_BODY}.LayerNorm"),
        *blocks(_BLOCK, "self", ("attention.output.LayerNorm", "output.LayerNorm")),
        *linear("predictions.dense", "fh", [f"{_HEAD}.transform.dense"], "hf", "f"),
        *norm("predictions.norm", f"{_HEAD}.transform.LayerNorm"),
        one("predictions.bias", "v", f"{_HEAD}.bias"),
        *linear("decoder", "vh", [f"{_HEAD}.decoder"], "vh"),
        *linear("pooler", "fh", ["bert.pooler.dense"], "hf", "f"),
        *linear("next_sentence", "hv", ["cls.seq_relationship"], "vh"),
    ),
    normal=_normal,
    spelled=_spelled,
    passed=(f"{_HEAD}.bias", "*position_ids"),  # a bias that an untied decoder does not use, and indices
    twins={f"{_BODY}.word_embeddings.weight": f"{_HEAD}.decoder.weight", f"{_HEAD}.bias": f"{_HEAD}.decoder.bias"},
)
