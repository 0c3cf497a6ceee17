"""GPT-2's directories. Its products are ``x W``, as ours are: no matrix is transposed."""

from __future__ import annotations

from colossal_mpi.layers.huggingface.architecture import (
    ACTIVATIONS,
    Architecture,
    Key,
    fixed,
    flag,
    optional,
    real,
    whole,
)
from colossal_mpi.layers.huggingface.axes import norm, one

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
        optional("n_inner", "inner"),
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
        one("blocks.{i}.attention.qkv.weight", "htad", f"{_BLOCK}.attn.c_attn.weight", "h(tad)"),
        one("blocks.{i}.attention.qkv.bias", "tad", f"{_BLOCK}.attn.c_attn.bias", "(tad)"),
        one("blocks.{i}.attention.out.weight", "adh", f"{_BLOCK}.attn.c_proj.weight", "(ad)h"),
        one("blocks.{i}.attention.out.bias", "h", f"{_BLOCK}.attn.c_proj.bias"),
        *norm("blocks.{i}.norm2", f"{_BLOCK}.ln_2"),
        one("blocks.{i}.mlp.up.weight", "hf", f"{_BLOCK}.mlp.c_fc.weight"),
        one("blocks.{i}.mlp.up.bias", "f", f"{_BLOCK}.mlp.c_fc.bias"),
        one("blocks.{i}.mlp.down.weight", "fh", f"{_BLOCK}.mlp.c_proj.weight"),
        one("blocks.{i}.mlp.down.bias", "h", f"{_BLOCK}.mlp.c_proj.bias"),
        *norm("norm", "transformer.ln_f"),
        one("head.weight", "vh", "lm_head.weight"),
    ),
    passed=("*.attn.bias", "*.attn.masked_bias"),  # the causal mask, which older versions stored
    twins={"transformer.wte.weight": "lm_head.weight"},
)
