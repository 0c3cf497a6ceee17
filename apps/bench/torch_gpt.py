"""The yardstick: the GPT of `layers.models` in PyTorch eager, with autograd and ``torch.optim.AdamW``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from colossal_mpi.apps.bench.steps import Sizes


class _Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        h, self.heads = sizes.hidden, sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class _GPT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.sequence, sizes.hidden)
        self.blocks = nn.Sequential(*[_Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


class Trainer:
    """The model with these weights, its optimizer and its data.

    Parameters
    ----------
    sizes : Sizes
    weights : mapping of str to numpy.ndarray
        By the names of `layers.models.GPT`.
    """

    def __init__(self, sizes: Sizes, weights: Mapping[str, Any]) -> None:
        from colossal_mpi.apps.bench.steps import CLIP, DECAY, OPTIMISER

        self.model, self.clip = _GPT(sizes), CLIP
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.from_numpy(_converted(name, weights)).reshape(parameter.shape))
        decays = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": decays, "weight_decay": DECAY},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **OPTIMISER)
        self.ids, self.labels = (torch.from_numpy(a) for a in sizes.sequences())

    def step(self) -> float:
        """Train one step and return its loss."""
        loss = functional.cross_entropy(self.model(self.ids).flatten(0, 1), self.labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Let PyTorch use that many threads for a while."""
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(before)


_OURS = {
    "norm1.weight": "norm1.gain",
    "norm2.weight": "norm2.gain",
    "norm.weight": "norm.gain",
    **{f"{part}.{kind}": f"attention.{part}.{kind}" for part in ("qkv", "out") for kind in ("weight", "bias")},
    **{f"{part}.{kind}": f"mlp.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")},
}


def _converted(name: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the weight of a parameter of PyTorch's, whose matrices are outputs by inputs."""
    block, _, own = name.rpartition("blocks.")[2].partition(".") if name.startswith("blocks.") else ("", "", name)
    array = weights[f"blocks.{block}.{_OURS.get(own, own)}" if block else _OURS.get(own, own)]
    if not own.endswith("weight") or array.ndim == 1 or not block:
        return array
    inputs = array.shape[0] if array.ndim == 2 or own.startswith("qkv") else array.shape[0] * array.shape[1]
    return np.ascontiguousarray(array.reshape(inputs, -1).T)
