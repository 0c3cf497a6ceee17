"""Llama: a decoder with rotary positions, RMSNorm, grouped queries and a gated MLP, and its mapping onto directories.

``apps`` trains it, and checkpoints and `from_pretrained` find it in the registry. Mistral is the same architecture with
a sliding attention window, Qwen2 with biases of queries, keys and values, and Qwen3 with norms of queries and keys.
With experts, Llama is Mixtral and Qwen3 is Qwen3-MoE. It is a chain of layers: nothing here communicates or knows the
grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from colossal_mpi.errors import ConfigError, OptionError
from colossal_mpi.layers.attention.rotary import ORIGINAL, SCALINGS, Rotary
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.embedding import Embedding
from colossal_mpi.layers.head import Head
from colossal_mpi.layers.models.gpt import expert_options
from colossal_mpi.layers.models.huggingface.architecture import (
    GATED_ACTIVATIONS,
    Architecture,
    ConfigKey,
    Table,
    WeightMap,
    boolean,
    fixed,
    integer,
    linear,
    optional_integer,
    real,
    tensor,
)
from colossal_mpi.layers.models.registry import register_model
from colossal_mpi.layers.norm import RMSNorm
from colossal_mpi.layers.parallelism import Parallelism


@dataclass(frozen=True)
class LlamaConfig:
    """The configuration of a `Llama`; the defaults are the sizes of Llama 3 8B.

    Parameters
    ----------
    vocabulary : int
        Number of tokens.
    layers : int
        Number of blocks.
    hidden : int
        Width of the residual stream.
    heads : int
        Query heads in each block.
    groups : int or None
        Groups of heads that share keys and values; None gives each head its own.
    width : int, optional
        Width of a head; ``hidden / heads`` by default.
    inner : int
        Width of the gated MLP.
    positions : int
        The longest sequence that the model is meant for, in tokens. No memory depends on it.
    theta : float
        Base of the rotary frequencies.
    sliding_window : int, optional
        Number of positions, up to its own, whose keys a query sees; None: all lower ones.
    sliding_layers : tuple of int, optional
        Numbers of the blocks that have the window; None: all.
    scaling : mapping, optional
        Scaling of the rotary frequencies, see `Rotary`.
    activation : str
        Gated activation of the MLP.
    eps : float
        Added to the mean square in the norms.
    bias : bool
        Whether the products of attention have biases.
    out_bias : bool, optional
        Whether the output product of attention has a bias; by default as `bias`.
    qk_norm : bool
        Whether each head's queries and keys are normalised, by RMSNorm with `eps`.
    mlp_bias : bool
        Whether the products of the MLP have biases.
    tied : bool
        Whether the head multiplies with the embedding table.
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
    expert_renormalise : bool, optional
        Whether the weights of a token's experts are scaled to the sum 1; by default they are if there are several.
    std : float
        Standard deviation of the initial weights.
    seed : int or None
        Seed of the initial weights; None makes zeros, for weights that are loaded afterwards.
    dtype : str
        Dtype of the weights.
    """

    vocabulary: int = 128256
    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    groups: int | None = 8
    width: int | None = None
    inner: int = 14336
    positions: int = 8192
    theta: float = 500000.0
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    scaling: Mapping[str, Any] | None = None
    activation: str = "swiglu"
    eps: float = 1e-5
    bias: bool = False
    out_bias: bool | None = None
    qk_norm: bool = False
    mlp_bias: bool = False
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 2
    expert_balance: float = 0.01
    expert_balance_over: str = "sequence"
    expert_z_loss: float = 0.0
    expert_renormalise: bool | None = None
    std: float = 0.02
    seed: int | None = 0
    dtype: str = "float32"


_BLOCK = "model.layers.{i}"
_ATTENTION, _MLP = f"{_BLOCK}.self_attn", f"{_BLOCK}.mlp"


def _keys(inner: int, positions: int, groups: int | None) -> tuple[ConfigKey, ...]:
    """Return the keys of Llama or Mistral, given the defaults in which they differ."""
    return (
        integer("vocab_size", "vocabulary", 32000),
        integer("num_hidden_layers", "layers", 32),
        integer("hidden_size", "hidden", 4096),
        integer("num_attention_heads", "heads", 32),
        optional_integer("num_key_value_heads", "groups", groups, missing=lambda config: config.heads),
        optional_integer("head_dim", "width", None),
        integer("intermediate_size", "inner", inner),
        integer("max_position_embeddings", "positions", positions),
        real("rope_theta", "theta", 10000.0),
        ConfigKey("rope_scaling", "scaling", kinds=(dict, type(None))),
        ConfigKey("hidden_act", "activation", "silu", GATED_ACTIVATIONS),
        real("rms_norm_eps", "eps", 1e-6),
        boolean("attention_bias", "bias", False),
        boolean("mlp_bias", "mlp_bias", False),
        boolean("tie_word_embeddings", "tied", False),
    )


def _without(*theirs: str, of: Sequence[ConfigKey]) -> list[ConfigKey]:
    """Return the keys but some, given by their names."""
    return [key for key in of if key.theirs not in theirs]


def _normalize(table: Table) -> Table:
    """Rewrite ``rope_parameters``, which now has scaling and base, as the two keys of older versions."""
    rope = table.get("rope_scaling") or table.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(f"rope_parameters={rope!r} cannot be run: they must be those of all layers")
    rope = {key: table[key] for key in ("partial_rotary_factor",) if key in table} | rope
    base = {key: rope[key] for key in ("rope_theta",) if key in rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if ORIGINAL in (SCALINGS[kind].needed if isinstance(kind, str) and kind in SCALINGS else ()):
        # transformers takes the key beside the mapping before the one in it, and the longest sequence if there is none.
        found = [
            part.get(key) for part, key in ((table, ORIGINAL), (rope, ORIGINAL), (table, "max_position_embeddings"))
        ]
        rope[ORIGINAL] = next((value for value in found if value is not None), None)
    try:
        Rotary(base.get("rope_theta", table.get("rope_theta")), rope)
    except OptionError as problem:
        raise ConfigError(f"rope_parameters={rope} cannot be run: {problem}") from None
    scaling = None if kind == "default" else {key: value for key, value in rope.items() if key != "rope_theta"}
    return table | base | {"rope_scaling": scaling}


def _denormalize(table: Table, extra: Table) -> Table:
    """Add ``rope_parameters``, so that old and new versions of transformers can read the table."""
    rope = {"rope_type": "default", **(table["rope_scaling"] or {}), "rope_theta": table["rope_theta"]}
    return table | {"rope_parameters": rope}


# The matrices of torch.nn.Linear are transposed: weight[out, in].
LLAMA = Architecture(
    model_type="llama",
    classes=("LlamaForCausalLM",),
    base="model",
    keys=_keys(inner=11008, positions=2048, groups=None),
    weights=(
        tensor("tokens.weight", "vh", "model.embed_tokens.weight"),
        tensor("blocks.{i}.norm1.gain", "h", f"{_BLOCK}.input_layernorm.weight"),
        *linear("blocks.{i}.attention.qkv", "htad", [f"{_ATTENTION}.{x}_proj" for x in "qkv"], "(ad)h"),
        *linear("blocks.{i}.attention.q", "hgrd", [f"{_ATTENTION}.q_proj"], "(grd)h"),
        *linear("blocks.{i}.attention.kv", "htgd", [f"{_ATTENTION}.{x}_proj" for x in "kv"], "(gd)h"),
        *(tensor(f"blocks.{{i}}.attention.{x}_norm.gain", "d", f"{_ATTENTION}.{x}_norm.weight") for x in "qk"),
        *linear("blocks.{i}.attention.out", "adh", [f"{_ATTENTION}.o_proj"], "h(ad)", "ad"),
        tensor("blocks.{i}.attention.out.weight", "grdh", f"{_ATTENTION}.o_proj.weight", "h(grd)"),
        tensor("blocks.{i}.norm2.gain", "h", f"{_BLOCK}.post_attention_layernorm.weight"),
        *linear("blocks.{i}.mlp.up", "htf", [f"{_MLP}.gate_proj", f"{_MLP}.up_proj"], "fh"),
        *linear("blocks.{i}.mlp.down", "fh", [f"{_MLP}.down_proj"], "hf", "f"),
        tensor("norm.gain", "h", "model.norm.weight"),
        tensor("head.weight", "vh", "lm_head.weight"),
    ),
    normalize=_normalize,
    denormalize=_denormalize,
    ignored=("*rotary_emb.inv_freq",),
    tied={"model.embed_tokens.weight": "lm_head.weight"},
)


def _normalize_mistral(table: Table) -> Table:
    """Refuse a mixture of layers with and without the window: the window of a Mistral slides in all of them."""
    kinds, window = table.get("layer_types") or [], table.get("sliding_window", 4096)
    if any(kind != ("full_attention" if window is None else "sliding_attention") for kind in kinds):
        raise ConfigError(
            f"layer_types={kinds!r} cannot be run with sliding_window={window!r}: every layer of a mistral has the "
            "sliding window, or none has"
        )
    return _normalize(table)


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    classes=("MistralForCausalLM",),
    keys=(*_keys(inner=14336, positions=131072, groups=8), optional_integer("sliding_window", "sliding_window", 4096)),
    normalize=_normalize_mistral,
)


_RENORMALISE = ConfigKey(
    "norm_topk_prob", "expert_renormalise", False, kinds=(bool,), missing=lambda config: config.experts_per_token > 1
)
_NOT_BALANCED = {"expert_balance": 0.0}
"""What training adds to the loss is not stored: transformers adds it where ``output_router_logits`` asks for it."""


def _experts_of(module: str, gate: str, up: str, down: str) -> tuple[WeightMap, ...]:
    """Return the maps of a router and of experts, given the names of the modules in a block."""
    each = f"{_BLOCK}.{module}.experts.{{e}}"
    return (
        tensor("blocks.{i}.mlp.router.weight", "he", f"{_BLOCK}.{module}.gate.weight", "eh"),
        WeightMap("blocks.{i}.mlp.up.weight", "ehtf", (f"{each}.{gate}.weight", f"{each}.{up}.weight"), "fh"),
        tensor("blocks.{i}.mlp.down.weight", "efh", f"{each}.{down}.weight", "hf"),
    )


def _normalize_mixtral(table: Table) -> Table:
    """Say that the weights of a token's experts have the sum 1, as they always do in a Mixtral."""
    return _normalize(table | {"norm_topk_prob": True})


def _denormalize_mixtral(table: Table, extra: Table) -> Table:
    """Leave out the key that a Mixtral lacks."""
    if not table["norm_topk_prob"]:
        raise ConfigError("the weights of a token's experts have the sum 1 in a mixtral: use expert_renormalise=True")
    return _denormalize({key: value for key, value in table.items() if key != "norm_topk_prob"}, extra)


MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    classes=("MixtralForCausalLM",),
    keys=(
        *_without("attention_bias", "mlp_bias", "rope_theta", "rms_norm_eps", of=_keys(14336, 131072, 8)),
        real("rope_theta", "theta", 1000000.0),
        real("rms_norm_eps", "eps", 1e-5),
        optional_integer("sliding_window", "sliding_window", None),
        integer("num_local_experts", "experts", 8),
        integer("num_experts_per_tok", "experts_per_token", 2),
        _RENORMALISE,
    ),
    weights=(*LLAMA.weights, *_experts_of("block_sparse_moe", "w1", "w3", "w2")),
    implied=_NOT_BALANCED,
    normalize=_normalize_mixtral,
    denormalize=_denormalize_mixtral,
)


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _normalize_qwen(table: Table) -> Table:
    """Rewrite the keys of the sliding window as a window and the numbers of the layers that have it."""
    window = table.get("sliding_window", 4096) if table.get("use_sliding_window", False) else None
    layers, first, kinds = (table.get(k, d) for k, d in _LAYERS_OF_QWEN.items())
    if kinds is None and isinstance(layers, int) and isinstance(first, int):
        kinds = [_FULL if window is None or i < first else _SLIDING for i in range(layers)]
    allowed = (_FULL,) if window is None else (_FULL, _SLIDING)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in allowed for kind in kinds):
        raise ConfigError(
            f"layer_types={kinds!r} cannot be run: with sliding_window={window!r} it must name one of "
            f"{', '.join(allowed)} for each of {layers} layers"
        )
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == _SLIDING)
    window = window if sliding else None
    return _normalize(table | {"sliding_window": window, "layer_types": sliding if 0 < len(sliding) < layers else None})


_LAYERS_OF_QWEN = {"num_hidden_layers": 32, "max_window_layers": 28, "layer_types": None}
"""The keys that say which layers have the window, with their defaults."""


def _denormalize_qwen(table: Table, extra: Table) -> Table:
    """Write the kind of each layer by its name."""
    layers, sliding = range(table["num_hidden_layers"]), table["layer_types"]
    window = table["sliding_window"]
    sliding = () if window is None else layers if sliding is None else sliding
    kinds = {"layer_types": [_SLIDING if i in sliding else _FULL for i in layers]}
    return _denormalize(table | kinds | {"use_sliding_window": window is not None}, extra)


def _width(config: LlamaConfig) -> int:
    """Return the width of a head."""
    return config.hidden // config.heads if config.width is None else config.width


_QWEN = (
    *_without("head_dim", "attention_bias", "mlp_bias", of=_keys(22016, 32768, 32)),
    optional_integer("sliding_window", "sliding_window", 4096),
    ConfigKey("layer_types", "sliding_layers", kinds=(tuple, type(None))),
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    classes=("Qwen2ForCausalLM",),
    keys=(*_QWEN, optional_integer("head_dim", "width", None, missing=_width)),
    implied={"bias": True, "out_bias": False},
    normalize=_normalize_qwen,
    denormalize=_denormalize_qwen,
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    classes=("Qwen3ForCausalLM",),
    keys=(*_QWEN, optional_integer("head_dim", "width", 128, missing=_width), boolean("attention_bias", "bias", False)),
    implied={"qk_norm": True},
)


def _normalize_qwen3_moe(table: Table) -> Table:
    """Rewrite the keys of the window, of layers without experts, and of the number of experts, which has two names."""
    window = table.get("sliding_window", 4096) if table.get("use_sliding_window", False) else None
    experts = {"num_experts": table["num_local_experts"]} if "num_local_experts" in table else {}
    without = table.get("mlp_only_layers") or None
    return _normalize(table | experts | {"sliding_window": window, "mlp_only_layers": without})


def _denormalize_qwen3_moe(table: Table, extra: Table) -> Table:
    """Say whether there is a window, and write the number of experts under both of its names."""
    experts = {"num_local_experts": table["num_experts"], "mlp_only_layers": []}
    return _denormalize(table | experts | {"use_sliding_window": table["sliding_window"] is not None}, extra)


QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    classes=("Qwen3MoeForCausalLM",),
    keys=(
        *_without("intermediate_size", "head_dim", "mlp_bias", of=_keys(0, 32768, 4)),
        optional_integer("head_dim", "width", None, missing=_width),
        optional_integer("sliding_window", "sliding_window", 4096),
        integer("moe_intermediate_size", "inner", 768),
        integer("num_experts", "experts", 128),
        integer("num_experts_per_tok", "experts_per_token", 8),
        _RENORMALISE,
        fixed("decoder_sparse_step", 1, 1),
        fixed("mlp_only_layers", None, None),
    ),
    weights=(*LLAMA.weights, *_experts_of("mlp", "gate_proj", "up_proj", "down_proj")),
    implied=QWEN3.implied | _NOT_BALANCED,
    normalize=_normalize_qwen3_moe,
    denormalize=_denormalize_qwen3_moe,
)


@register_model("llama", LlamaConfig, task="language", huggingface=[LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE])
class Llama(Sequential):
    """Llama: token ids ``[b, s]`` to logits ``[b, s, v]``. Mistral, Mixtral, Qwen2 and Qwen3 are options of it.

    Parameters
    ----------
    config : LlamaConfig
        Sizes, initial weights and dtype.
    parallelism : Parallelism
        The grid and the tensor mode.

    References
    ----------
    Touvron et al.: LLaMA, 2023. Llama team: The Llama 3 herd of models, 2024. Jiang et al.: Mistral 7B, 2023. Jiang et
    al.: Mixtral of experts, 2024. Qwen team: Qwen2 technical report, 2024. Qwen team: Qwen3 technical report, 2025.

    Examples
    --------
    >>> small = LlamaConfig(vocabulary=256, layers=2, hidden=64, heads=4, groups=2, inner=176)
    >>> model = Llama(small, Parallelism(Grid(row=2, col=2), "2d"))
    """

    def __init__(self, config: LlamaConfig, parallelism: Parallelism) -> None:
        self.config, c = config, config
        initial: dict[str, Any] = {"std": c.std, "seed": c.seed, "dtype": c.dtype}
        tokens = Embedding(c.vocabulary, c.hidden, parallelism, "tokens", **initial)
        rotary = Rotary(c.theta, c.scaling)
        sliding = range(c.layers) if c.sliding_layers is None else c.sliding_layers
        attention: dict[str, Any] = {
            **{"groups": c.groups, "width": c.width, "rotary": rotary, "bias": c.bias, "out_bias": c.out_bias},
            "qk_norm": c.eps if c.qk_norm else None,
        }
        sizes, shared = {"v": c.vocabulary, "h": c.hidden}, tokens.table if c.tied else None
        balancing = c.expert_balance, c.expert_balance_over, c.expert_z_loss
        experts = expert_options(c.experts, c.experts_per_token, *balancing, c.expert_renormalise)
        super().__init__(
            tokens,
            *[
                TransformerBlock(
                    c.hidden,
                    c.heads,
                    c.inner,
                    parallelism,
                    f"blocks.{i}",
                    norm="rms",
                    eps=c.eps,
                    activation=c.activation,
                    bias=c.mlp_bias,
                    attention=attention | {"window": c.sliding_window if i in sliding else None},
                    out_std=c.std,
                    experts=experts,
                    **initial,
                )
                for i in range(c.layers)
            ],
            RMSNorm(c.hidden, parallelism, "norm", eps=c.eps, dtype=c.dtype),
            Head("bsh,vh->bsv", sizes, "v", parallelism, "head", bias=False, weight=shared, **initial),
        )
