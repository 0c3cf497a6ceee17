"""Models of transformers with random weights, nothing of which divides, and its logits and gradients of them."""

import json
import shutil

import numpy as np

B, S, V = 5, 9, 257
_rng = np.random.default_rng(4)
TOKENS, LABELS = _rng.integers(0, V, (2, B, S))
LENGTHS = np.array([9, 4, 7, 1, 9])
MASK = np.arange(S) < LENGTHS[:, None]
LABELS = np.where(MASK, LABELS, -1)

_COMMON = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
_GPT = {**_COMMON, "n_positions": 11, "n_embd": 20, "n_head": 5, "n_layer": 3}
MODELS = ("gpt2",)
"""The cases for every mode."""
CASES = {
    "gpt2": ("GPT2LMHeadModel", _GPT),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        {**_GPT, "n_inner": 23, "n_layer": 1, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
}
"""Class and configuration of each."""


def prepare(path):
    """Write, of each case, the directory, the same of its gradients, and the logits."""
    import torch

    from reference.hf_float64 import double, made, randomised

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
        _save_gradients(model, path / name, path / f"{name}-gradients")


def _save_gradients(model, weights, directory):
    from safetensors.torch import save_file

    directory.mkdir()
    shutil.copy(weights / "config.json", directory)
    gradients = {name: p.grad.contiguous() for name, p in model.named_parameters()}
    assert all(abs(g).max() > 0 for g in gradients.values())
    save_file(gradients, directory / "model.safetensors", {"format": "pt"})


def _run(model):
    """Return the logits by name and the loss, a mean over all that counts, in float64."""
    import torch
    from torch.nn import functional

    mask = torch.tensor(MASK)
    logits = model(torch.tensor(TOKENS), attention_mask=mask.long()).logits
    loss = functional.cross_entropy(logits.reshape(-1, V), torch.tensor(LABELS).reshape(-1), ignore_index=-1)
    return {"logits": logits}, loss


RESPELLED = {}
"""Keys of a case that come back in another spelling."""


def tensors(directory):
    """Return all tensors of a directory."""
    from safetensors.numpy import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {name: array for file in files for name, array in load_file(file).items()}


def same_tensors(one, other):
    """Say whether two directories hold the same tensors, bit for bit."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a)


def table(directory):
    return json.loads((directory / "config.json").read_text())
