"""Llama's directories, and Mistral's, which are of the same architecture unless their windows slide."""

from __future__ import annotations

from dataclasses import replace

from colossal_mpi.errors import ConfigError, OptionError
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.models.huggingface.architecture import (
    Architecture,
    Key,
    Table,
    fixed,
    flag,
    optional,
    real,
    whole,
)
from colossal_mpi.layers.models.huggingface.axes import linear, one

_BLOCK = "model.layers.{i}"
_ATTENTION, _MLP = f"{_BLOCK}.self_attn", f"{_BLOCK}.mlp"
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu-tanh", "relu": "reglu"}


def _keys(inner: int, positions: int, groups: int | None) -> tuple[Key, ...]:
    """Return the keys, with the defaults in which the two differ."""
    return (
        whole("vocab_size", "vocabulary", 32000),
        whole("num_hidden_layers", "layers", 32),
        whole("hidden_size", "hidden", 4096),
        whole("num_attention_heads", "heads", 32),
        optional("num_key_value_heads", "groups", groups),
        optional("head_dim", "width", None),
        whole("intermediate_size", "inner", inner),
        whole("max_position_embeddings", "positions", positions),
        real("rope_theta", "theta", 10000.0),
        Key("rope_scaling", "scaling", kinds=(dict, type(None))),
        Key("hidden_act", "activation", "silu", _GATED),
        real("rms_norm_eps", "eps", 1e-6),
        flag("attention_bias", "bias", False),
        flag("mlp_bias", "mlp_bias", False),
        flag("tie_word_embeddings", "tied", False),
    )


def _normal(table: Table) -> Table:
    """Give the rotary positions the spelling of older versions: today ``rope_parameters`` has scaling and base."""
    rope = table.get("rope_scaling") or table.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"rope_parameters={rope!r} cannot be run: they must be those of all layers")
    rope = {key: table[key] for key in ("partial_rotary_factor",) if key in table} | rope
    base = {key: rope[key] for key in ("rope_theta",) if key in rope}
    try:
        Rotary(None, rope)
    except OptionError as problem:
        raise ConfigError(f"rope_parameters={rope} cannot be run: {problem}") from None
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    scaling = None if plain else {key: value for key, value in rope.items() if key != "rope_theta"}
    return table | base | {"rope_scaling": scaling}


def _spelled(table: Table, extra: Table) -> Table:
    """Say it in today's spelling, too."""
    rope = {"rope_type": "default", **(table["rope_scaling"] or {}), "rope_theta": table["rope_theta"]}
    return table | {"rope_parameters": rope}


LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM",),
    base="model",
    keys=_keys(inner=11008, positions=2048, groups=None),
    entries=(
        one("tokens.weight", "vh", "model.embed_tokens.weight"),
        one("blocks.{i}.norm1.gain", "h", f"{_BLOCK}.input_layernorm.weight"),
        *linear("blocks.{i}.attention.qkv", "htad", [f"{_ATTENTION}.{x}_proj" for x in "qkv"], "(ad)h"),
        *linear("blocks.{i}.attention.q", "hgrd", [f"{_ATTENTION}.q_proj"], "(grd)h"),
        *linear("blocks.{i}.attention.kv", "htgd", [f"{_ATTENTION}.{x}_proj" for x in "kv"], "(gd)h"),
        *linear("blocks.{i}.attention.out", "adh", [f"{_ATTENTION}.o_proj"], "h(ad)", "ad"),
        one("blocks.{i}.attention.out.weight", "grdh", f"{_ATTENTION}.o_proj.weight", "h(grd)"),
        one("blocks.{i}.norm2.gain", "h", f"{_BLOCK}.post_attention_layernorm.weight"),
        *linear("blocks.{i}.mlp.up", "htf", [f"{_MLP}.gate_proj", f"{_MLP}.up_proj"], "fh"),
        *linear("blocks.{i}.mlp.down", "fh", [f"{_MLP}.down_proj"], "hf", "f"),
        one("norm.gain", "h", "model.norm.weight"),
        one("head.weight", "vh", "lm_head.weight"),
    ),
    normal=_normal,
    spelled=_spelled,
    passed=("*rotary_emb.inv_freq",),
    twins={"model.embed_tokens.weight": "lm_head.weight"},
)


def _full_windows(table: Table) -> Table:
    """Leave out a window that no sequence is too long for."""
    window, longest = table.get("sliding_window", 4096), table.get("max_position_embeddings", 131072)
    seen = isinstance(window, int) and isinstance(longest, int) and window >= longest
    return _normal(table | {"sliding_window": None if seen else window})


MISTRAL = replace(
    LLAMA,
    name="mistral",
    classes=("MistralForCausalLM",),
    keys=(*_keys(inner=14336, positions=131072, groups=8), fixed("sliding_window", 4096, None)),
    normal=_full_windows,
)
