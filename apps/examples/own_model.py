"""A small language model, trained on the documentation of Python; no line of it says how it is parallel."""

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from colossal_mpi import from_global, layers
from colossal_mpi.apps.cli.arguments import from_command_line

TEXT = np.frombuffer("".join(topics[name] for name in sorted(topics)).encode(), np.uint8).astype(np.int64)
BATCH, LENGTH, WIDTH = 9, 31, 40


class Model(layers.Sequential):  # from bytes to logits of the next byte; Sequential has the backward pass already
    def __init__(self, p: layers.Parallelism, **kw: Any) -> None:
        experts = layers.MoE(WIDTH, 2 * WIDTH, 3, p, "experts", balance=0.01, **kw)
        super().__init__(
            layers.Embedding(256, WIDTH, p, "bytes", **kw),
            layers.PositionEmbedding(LENGTH, WIDTH, p, "positions", **kw),
            layers.Residual(layers.RMSNorm(WIDTH, p, "norm1", **kw), layers.SelfAttention(WIDTH, 5, p, "heads", **kw)),
            layers.Residual(layers.RMSNorm(WIDTH, p, "norm2", **kw), experts),
            layers.Linear("bsh,hv->bsv", {"h": WIDTH, "v": 256}, "v", p, "head", **kw),
        )


def train(p: layers.Parallelism, steps: int, dtype: str = "float32") -> Iterator[float]:
    model, loss = Model(p, dtype=dtype), layers.CrossEntropy(p)
    optimizer = layers.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        places = np.random.default_rng(step).integers(0, len(TEXT) - LENGTH, (BATCH, 1)) + np.arange(LENGTH)
        x, labels = (from_global(TEXT[places + shift], p.grid, p.tokens()) for shift in (0, 1))
        yield layers.backpropagate(model, loss, x, labels, layers.Context(step=step))
        optimizer.step()


if __name__ == "__main__":
    p, options = from_command_line(steps=50)
    for step, loss in enumerate(train(p, options.steps), 1):
        if p.grid.rank == 0:
            print(f"step {step}  loss {loss:.3f}")
