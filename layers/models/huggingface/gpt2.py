"""GPT-2's directories. Its products are ``x W``, as ours are: no matrix is transposed."""

from __future__ import annotations

from colossal_mpi.layers.models.huggingface.architecture import (
    ACTIVATIONS,
    Architecture,
    Key,
    fixed,
    flag,
    optional,
    real,
    whole,
)
from colossal_mpi.layers.models.huggingface.axes import linear, norm, one

_BLOCK = "transformer.h.{i}"


GPT2 = Architecture(
    name="gpt2",
    classes=("GPT2LMHeadModel",),
    base="transformer",
    keys=(
        whole("vocab_size", "vocabulary", 50257),
        whole("n_positions", "positions", 1024),
        whole("n_embd", "hidden", 768),
        whole("n_layer", "layers", 12),
        whole("n_head", "heads", 12),
        optional("n_inner", "inner", None),
        real("layer_norm_epsilon", "eps", 1e-5),
        flag("tie_word_embeddings", "tied", True),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        fixed("scale_attn_weights", True, True),
        fixed("scale_attn_by_inverse_layer_idx", False, False),
        fixed("add_cross_attention", False, False),
    ),
    entries=(
        one("tokens.weight", "vh", "transformer.wte.weight"),
        one("positions.weight", "ph", "transformer.wpe.weight"),
        *norm("blocks.{i}.norm1", f"{_BLOCK}.ln_1"),
        *linear("blocks.{i}.attention.qkv", "htad", [f"{_BLOCK}.attn.c_attn"], "h(tad)"),
        *linear("blocks.{i}.attention.out", "adh", [f"{_BLOCK}.attn.c_proj"], "(ad)h", "ad"),
        *norm("blocks.{i}.norm2", f"{_BLOCK}.ln_2"),
        *linear("blocks.{i}.mlp.up", "hf", [f"{_BLOCK}.mlp.c_fc"], "hf"),
        *linear("blocks.{i}.mlp.down", "fh", [f"{_BLOCK}.mlp.c_proj"], "fh", "f"),
        *norm("norm", "transformer.ln_f"),
        one("head.weight", "vh", "lm_head.weight"),
    ),
    passed=("*.attn.bias", "*.attn.masked_bias"),  # the causal mask, which older versions stored
    twins={"transformer.wte.weight": "lm_head.weight"},
)
