"""The GPT of `gpt_case` in PyTorch with autograd, as an independent reference."""

import torch
from torch.nn import functional

from tests.reference.torch_attention import self_attention


def loss_and_gradients(weights, tokens, labels, heads, dtype="float64"):
    """Return the loss and every parameter's gradient for weights that are NumPy arrays by name."""
    w = {name: torch.tensor(value, dtype=getattr(torch, dtype), requires_grad=True) for name, value in weights.items()}
    x = w["tokens.weight"][torch.tensor(tokens)] + w["positions.weight"][: tokens.shape[1]]
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(layers):
        p = {name.removeprefix(f"blocks.{i}."): v for name, v in w.items() if name.startswith(f"blocks.{i}.")}
        heads = {name.removeprefix("attention."): v for name, v in p.items() if name.startswith("attention.")}
        x = x + self_attention(_norm(x, p, "norm1"), heads)
        y = functional.gelu(_norm(x, p, "norm2") @ p["mlp.up.weight"] + p["mlp.up.bias"], approximate="tanh")
        x = x + y @ p["mlp.down.weight"] + p["mlp.down.bias"]
    logits = _norm(x, w, "norm") @ w["tokens.weight"].T
    flat = torch.tensor(labels).reshape(-1)
    loss = functional.cross_entropy(logits.reshape(flat.numel(), -1), flat, ignore_index=-1)
    loss.backward()
    return loss.item(), {name: v.grad.numpy() for name, v in w.items()}


def _norm(x, p, name):
    return functional.layer_norm(x, x.shape[-1:], p[f"{name}.gain"], p[f"{name}.bias"])
