"""ViT's directories, for classification."""

from __future__ import annotations

from colossal_mpi.layers.models.huggingface.architecture import Architecture, Key, Table, fixed, whole
from colossal_mpi.layers.models.huggingface.axes import linear, norm, one
from colossal_mpi.layers.models.huggingface.bert import blocks, sizes

_BODY = "vit.embeddings"


def _normal(table: Table) -> Table:
    """Count the labels, of which transformers makes two where none are given."""
    pairs = {key: tuple(table[key]) for key in ("image_size", "patch_size") if isinstance(table.get(key), list)}
    return table | pairs | {"labels": len(table.get("id2label") or range(2))}


def _spelled(table: Table, extra: Table) -> Table:
    """Keep the names of the labels where there are any."""
    count, named = table.pop("labels"), extra.get("id2label") or {}
    if len(named) == count:
        return table
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return table | {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


VIT = Architecture(
    name="vit",
    classes=("ViTForImageClassification",),
    base="vit",
    keys=(
        Key("image_size", "image", 224, kinds=(int, tuple)),
        Key("patch_size", "patch", 16, kinds=(int, tuple)),
        whole("num_channels", "channels", 3),
        whole("labels", "classes", 2),
        *sizes(),
        fixed("qkv_bias", True, True),
    ),
    entries=(
        *linear("patches", "cijh", [f"{_BODY}.patch_embeddings.projection"], "hcij", "cij"),
        one("patches.token", "h", f"{_BODY}.cls_token", "11h"),
        one("positions.weight", "ph", f"{_BODY}.position_embeddings", "1ph"),
        *blocks("vit.encoder.layer.{i}", "attention", ("layernorm_before", "layernorm_after")),
        *norm("norm", "vit.layernorm"),
        *linear("head", "hv", ["classifier"], "vh"),
    ),
    normal=_normal,
    spelled=_spelled,
    # A pooler, which classification does not use.
    passed=("vit.pooler.*",),
)
