"""GPT-2's directories. Its products are ``x W``, as ours are: no matrix is transposed."""

from __future__ import annotations

from colossal_mpi.layers.huggingface.architecture import ACTIVATIONS, Architecture, Key, fixed, flag, real, whole
from colossal_mpi.layers.huggingface.axes import Entry

_BLOCK = "transformer.h.{i}"


def _entry(ours: str, letters: str, theirs: str, dims: str | None = None) -> Entry:
    return Entry(ours, letters, (theirs,), dims or letters)


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
        whole("n_inner", "inner", None, optional=True),
        real("layer_norm_epsilon", "eps", 1e-5),
        flag("tie_word_embeddings", "tied", True),
        Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
        fixed("scale_attn_weights", True, True),
        fixed("scale_attn_by_inverse_layer_idx", False, False),
        fixed("add_cross_attention", False, False),
    ),
    entries=(
        _entry("tokens.weight", "vh", "transformer.wte.weight"),
        _entry("positions.weight", "ph", "transformer.wpe.weight"),
        _entry("blocks.{i}.norm1.gain", "h", f"{_BLOCK}.ln_1.weight"),
        _entry("blocks.{i}.norm1.bias", "h", f"{_BLOCK}.ln_1.bias"),
        _entry("blocks.{i}.attention.qkv.weight", "htad", f"{_BLOCK}.attn.c_attn.weight", "h(tad)"),
        _entry("blocks.{i}.attention.qkv.bias", "tad", f"{_BLOCK}.attn.c_attn.bias", "(tad)"),
        _entry("blocks.{i}.attention.out.weight", "adh", f"{_BLOCK}.attn.c_proj.weight", "(ad)h"),
        _entry("blocks.{i}.attention.out.bias", "h", f"{_BLOCK}.attn.c_proj.bias"),
        _entry("blocks.{i}.norm2.gain", "h", f"{_BLOCK}.ln_2.weight"),
        _entry("blocks.{i}.norm2.bias", "h", f"{_BLOCK}.ln_2.bias"),
        _entry("blocks.{i}.mlp.up.weight", "hf", f"{_BLOCK}.mlp.c_fc.weight"),
        _entry("blocks.{i}.mlp.up.bias", "f", f"{_BLOCK}.mlp.c_fc.bias"),
        _entry("blocks.{i}.mlp.down.weight", "fh", f"{_BLOCK}.mlp.c_proj.weight"),
        _entry("blocks.{i}.mlp.down.bias", "h", f"{_BLOCK}.mlp.c_proj.bias"),
        _entry("norm.gain", "h", "transformer.ln_f.weight"),
        _entry("norm.bias", "h", "transformer.ln_f.bias"),
        _entry("head.weight", "vh", "lm_head.weight"),
    ),
    # The causal mask, which older versions stored, and the head where it is the embedding.
    passed=("*.attn.bias", "*.attn.masked_bias", "lm_head.weight"),
)
