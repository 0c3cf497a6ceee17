"""The GPT of ``layers.models`` in PyTorch eager, with autograd and ``torch.optim.AdamW``.

``bench train`` compares with it; no other module imports torch for a benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from colossal_mpi.apps.bench.gpt import GPTBenchmark

Array: TypeAlias = "npt.NDArray[np.float32]"


class _Block(nn.Module):
    def __init__(self, sizes: GPTBenchmark) -> None:
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
        mlp: Tensor = self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + mlp


class _GPT(nn.Module):
    def __init__(self, sizes: GPTBenchmark) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.sequence, sizes.hidden)
        self.blocks = nn.Sequential(*[_Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.LayerNorm(sizes.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        y: Tensor = self.norm(self.blocks(x))
        return functional.linear(y, self.tokens.weight)


class Trainer:
    """The model with its weights, its optimizer and its data.

    Parameters
    ----------
    sizes : GPTBenchmark
        The sizes of the model and of a step.
    weights : mapping of str to numpy.ndarray
        The first weights, by the names of ``layers.models.GPT``.
    optimizer : mapping of str to object
        Options of ``torch.optim.AdamW``.
    decay : float
        Weight decay of the matrices; biases and gains have none.
    clip : float
        Norm to which gradients are clipped.
    """

    def __init__(
        self,
        sizes: GPTBenchmark,
        weights: Mapping[str, Array],
        optimizer: Mapping[str, Any],
        decay: float,
        clip: float,
    ) -> None:
        self.model, self.clip = _GPT(sizes), clip
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.from_numpy(_converted(name, weights)).reshape(parameter.shape))
        decays = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": decays, "weight_decay": decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **optimizer)
        self.ids, self.labels = (torch.from_numpy(a) for a in sizes.sequences())

    def step(self) -> float:
        """Train one step and return its loss."""
        loss = functional.cross_entropy(self.model(self.ids).flatten(0, 1), self.labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Let PyTorch use this number of threads in the context."""
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


def _converted(name: str, weights: Mapping[str, Array]) -> Array:
    """Return the weight of a parameter of PyTorch, whose matrices are outputs x inputs."""
    block, _, own = name.rpartition("blocks.")[2].partition(".") if name.startswith("blocks.") else ("", "", name)
    array = weights[f"blocks.{block}.{_OURS.get(own, own)}" if block else _OURS.get(own, own)]
    if not own.endswith("weight") or array.ndim == 1 or not block:
        return array
    inputs = array.shape[0] if array.ndim == 2 or own.startswith("qkv") else array.shape[0] * array.shape[1]
    return np.ascontiguousarray(array.reshape(inputs, -1).T)
