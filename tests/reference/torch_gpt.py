"""The same GPT in PyTorch with autograd: the independent reference."""

import math

import torch
from torch.nn import functional


def loss_and_gradients(weights, tokens, labels, heads, dtype="float64"):
    """Return the loss and every parameter's gradient, of weights given as NumPy arrays by name."""
    w = {name: torch.tensor(value, dtype=getattr(torch, dtype), requires_grad=True) for name, value in weights.items()}
    x = w["tokens.weight"][torch.tensor(tokens)] + w["positions.weight"][: tokens.shape[1]]
    layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(layers):
        p = {name.removeprefix(f"blocks.{i}."): v for name, v in w.items() if name.startswith(f"blocks.{i}.")}
        x = x + attention(_norm(x, p, "norm1"), p)
        y = functional.gelu(_norm(x, p, "norm2") @ p["mlp.up.weight"] + p["mlp.up.bias"], approximate="tanh")
        x = x + y @ p["mlp.down.weight"] + p["mlp.down.bias"]
    logits = _norm(x, w, "norm") @ w["tokens.weight"].T
    flat = torch.tensor(labels).reshape(-1)
    loss = functional.cross_entropy(logits.reshape(flat.numel(), -1), flat, ignore_index=-1)
    loss.backward()
    return loss.item(), {name: v.grad.numpy() for name, v in w.items()}


def _norm(x, p, name):
    return functional.layer_norm(x, x.shape[-1:], p[f"{name}.gain"], p[f"{name}.bias"])


def attention(x, p, causal=True, mask=None):
    """Return self-attention; a query that sees no key of ``mask [b, s]`` gives the bias of the output alone."""
    q, k, v = (torch.einsum("bsh,had->bsad", x, p["attention.qkv.weight"][:, t]) for t in range(3))
    q, k, v = (z + p["attention.qkv.bias"][t] for t, z in enumerate((q, k, v)))
    scores = torch.einsum("bqad,bkad->baqk", q, k) / math.sqrt(q.shape[-1])
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    seen = (seen.tril() if causal else seen).expand(scores.shape)
    seen = seen if mask is None else seen & mask[:, None, None, :]
    hidden = ~seen & seen.any(-1, keepdim=True)
    probabilities = scores.masked_fill(hidden, -math.inf).softmax(-1) * seen
    out = torch.einsum("baqk,bkad->bqad", probabilities, v)
    return torch.einsum("bsad,adh->bsh", out, p["attention.out.weight"]) + p["attention.out.bias"]
