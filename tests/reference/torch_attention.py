"""Self-attention in PyTorch with autograd, as an independent reference."""

import math

import numpy as np
import torch


def rotate(x, positions, theta):
    """Return ``[b, s, a, d]`` rotated as in Hugging Face's Llama."""
    d = x.shape[-1]
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = positions[..., None].to(torch.float64) * frequencies
    cos, sin = (f(torch.cat([angle, angle], -1)).reshape(-1, x.shape[1], 1, d) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin


def attend(q, k, v, causal=True, mask=None, positions=None, window=None):
    """Return attention of ``[b, s, a, d]`` to ``[b, t, g, d]``; a query that sees no key gives zeros."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqad,bkad->baqk", q, k) / math.sqrt(q.shape[-1])
    at = [torch.arange(x.shape[1]) for x in (q, k)] if positions is None else positions
    of_q, of_k = (x.expand(q.shape[0], x.shape[-1]) for x in at)
    distance = of_q[:, None, :, None] - of_k[:, None, None, :]
    most = math.inf if window is None else torch.as_tensor(window)
    if np.ndim(window):
        most = most[:, None, :, None]
    seen = ((distance >= 0) & (distance < most)) | torch.tensor(not causal)
    seen = (seen if mask is None else seen & mask[:, None, None, :]).expand(scores.shape)
    hidden = ~seen & seen.any(-1, keepdim=True)
    return torch.einsum("baqk,bkad->bqad", scores.masked_fill(hidden, -math.inf).softmax(-1) * seen, v)


def _project(x, w, name, t=None):
    at = ... if t is None else (slice(None), t)
    y = torch.tensordot(x, w[f"{name}.weight"][at], dims=1)
    bias = w.get(f"{name}.bias")
    return (y if bias is None else y + (bias if t is None else bias[t])).flatten(2, -2)


def self_attention(x, w, causal=True, mask=None, positions=None, theta=None):
    """Return self-attention with the weights of a layer by name, multi-head or grouped, its heads turned by `theta`."""
    if "qkv.weight" in w:
        q, k, v = (_project(x, w, "qkv", t) for t in range(3))
    else:
        q, (k, v) = _project(x, w, "q"), (_project(x, w, "kv", t) for t in range(2))
    if theta is not None:
        at = torch.arange(x.shape[1]) if positions is None else positions
        q, k = rotate(q, at, theta), rotate(k, at, theta)
    out = attend(q, k, v, causal, mask, None if positions is None else (positions, positions))
    y = out.flatten(2) @ w["out.weight"].reshape(-1, x.shape[-1])
    return y + w["out.bias"] if "out.bias" in w else y
