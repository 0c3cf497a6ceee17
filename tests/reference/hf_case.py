"""Models of transformers with random weights and sizes that do not divide, with their logits and gradients."""

import json

import numpy as np

B, S, V = 5, 9, 257
_rng = np.random.default_rng(4)
TOKENS, LABELS = _rng.integers(0, V, (2, B, S))
LENGTHS = np.array([9, 4, 7, 1, 9])
MASK = np.arange(S) < LENGTHS[:, None]
LABELS = np.where(MASK, LABELS, -1)

SEGMENTS = (np.arange(S) >= LENGTHS[:, None] // 2) * _rng.integers(1, 3, (B, S))
FOLLOWS = _rng.integers(0, 2, B)
IMAGES, CLASSES = _rng.standard_normal((B, 3, 9, 7)), _rng.integers(0, 7, B)

_TEXT = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {**_TEXT, "n_positions": 11, "n_embd": 20, "n_head": 5, "n_layer": 3}
_BLOCKS = {"hidden_size": 20, "num_attention_heads": 5, "num_hidden_layers": 3, "intermediate_size": 23}
_BERT = {**_TEXT, **_BLOCKS, "max_position_embeddings": 11, "type_vocab_size": 3}
_VIT = {**_BLOCKS, "image_size": [9, 7], "patch_size": 3, "id2label": {i: f"class {i}" for i in range(7)}}
_LLAMA = {
    **_TEXT,
    "hidden_size": 18,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 23,
    "max_position_embeddings": 11,
}
_EAGER = {"experts_implementation": "eager"}
_SLIDES = {"use_sliding_window": True, "sliding_window": 3}
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = ("gpt2", "llama", "mixtral", "bert", "vit")
"""The cases that tests run in every mode."""
FAMILIES = ("mistral", "qwen2", "qwen3", "qwen3-experts")
"""The cases that tests run in every mode, on up to 5 ranks."""
CASES = {
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        {**_GPT, "n_inner": 23, "n_layer": 1, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama-tied": (
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "num_hidden_layers": 1,
            "num_key_value_heads": 6,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": _SCALED,
        },
    ),
    "llama-yarn": ("LlamaForCausalLM", {**_LLAMA, "num_hidden_layers": 1, "rope_parameters": _YARN}),
    "mistral": (
        "MistralForCausalLM",
        {**_LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 3, "sliding_window": 4},
    ),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in {**_LLAMA, "hidden_size": 24}.items() if k != "head_dim"}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {**_LLAMA, **_SLIDES, "num_hidden_layers": 2, "num_key_value_heads": 6, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 1}),
    "qwen3-heads": (
        "Qwen3ForCausalLM",
        {
            **{**_LLAMA, **_SLIDES, "num_hidden_layers": 2, "num_key_value_heads": 6, "attention_bias": True},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**_LLAMA, "num_hidden_layers": 2, "num_local_experts": 5, "sliding_window": 4, **_EAGER},
    ),
    "qwen3-experts": (
        "Qwen3MoeForCausalLM",
        {
            **{**_LLAMA, "num_hidden_layers": 1, "num_key_value_heads": 6, "moe_intermediate_size": 7, **_EAGER},
            **{"num_experts": 4, "num_experts_per_tok": 3},
        },
    ),
    "bert": ("BertForPreTraining", _BERT),
    "bert-masked": ("BertForMaskedLM", {**_BERT, "num_hidden_layers": 1, "hidden_act": "gelu_new"}),
    "bert-classes": ("BertForSequenceClassification", {**_BERT, "num_hidden_layers": 1, "id2label": _VIT["id2label"]}),
    "bert-untied": ("BertForMaskedLM", {**_BERT, "num_hidden_layers": 1, "tie_word_embeddings": False}),
    "vit": ("ViTForImageClassification", _VIT),
}
"""Class and configuration of each case."""


def prepare(path):
    """Write the directory of each case, a second one with gradients in place of weights, and the logits."""
    import torch

    from tests.reference.hf_float64 import double, made, randomised

    torch.manual_seed(0)
    for name, (kind, options) in CASES.items():
        with double():
            model = randomised(made(kind, options))
            logits, loss = _run(model)
            loss.backward()
        np.savez(
            path / f"{name}.npz", **{key: value.detach().numpy() for key, value in logits.items()}, loss=loss.item()
        )
        model.save_pretrained(path / name)
        _save_gradients(model, path / f"{name}-gradients")


def _save_gradients(model, directory):
    """Write the gradients as if they were the weights: under the names, and cut as, the class writes them."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert abs(parameter.grad).max() > 0, name
            parameter.data = parameter.grad
    model.save_pretrained(directory)


def _run(model):
    """Return the logits by name and the loss in float64: a mean over the labels that count, summed over the heads."""
    import torch
    from torch.nn import functional

    kind = type(model).__name__
    if kind.startswith("ViT"):
        inputs = {"pixel_values": torch.tensor(IMAGES)}
    else:
        inputs = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(MASK).long()}
    if kind.startswith("Bert"):
        inputs["token_type_ids"] = torch.tensor(SEGMENTS)
    out = model(**inputs)
    logits = dict(zip(outputs_of(kind), [v for k, v in out.items() if "logits" in k], strict=True))
    loss = sum(
        functional.cross_entropy(y.flatten(0, -2), torch.tensor(labels_of(name)).flatten(), ignore_index=-1)
        for name, y in logits.items()
    )
    return logits, loss


def outputs_of(kind):
    """Return the names of the outputs of a class of transformers."""
    if kind.endswith("Classification"):
        return ("classes",)
    return ("tokens", "follows") if kind == "BertForPreTraining" else ("tokens",)


def labels_of(output):
    return {"tokens": LABELS, "follows": FOLLOWS, "classes": CLASSES}[output]


UNUSED = {"cls.predictions.bias"}
"""The tensor that an untied BERT has but does not use; it is saved as a copy of the bias that is used."""


def tensors(directory):
    """Return all tensors of a directory."""
    from safetensors.numpy import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def same_tensors(one, other):
    """Say whether two directories hold the same tensors, bit for bit."""
    a, b = tensors(one), tensors(other)
    same = all(
        a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in (a.keys() & b.keys()) - UNUSED
    )
    return same and b.keys() == a.keys()


def eager(name):
    """Return the options with which transformers computes the experts of a case in float64."""
    return _EAGER if "experts_implementation" in CASES[name][1] else {}


def table(directory):
    return json.loads((directory / "config.json").read_text())
