"""One training run: model, optimizer and corpus, stepped, validated, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import checkpoint, comm, random
from colossal_mpi.apps import data
from colossal_mpi.apps.config import Config
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, models
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.optim import AdamW, warmup_cosine
from colossal_mpi.layout import part


class Trainer:
    """A GPT, its optimizer and its corpus on a grid; everything random is a function of the seed.

    Parameters
    ----------
    config : Config
    grid : Grid
    """

    def __init__(self, config: Config, grid: Grid) -> None:
        model, parallel, training = config.model, config.parallel, config.training
        self.config, self.grid = config, grid
        self.parallelism = Parallelism(grid, parallel.tensor, parallel.keep_gathered)
        self.corpus = data.read_corpus(config.data.files, config.data.validation, model.context, grid)
        sizes = GPTConfig(
            vocabulary=model.vocabulary,
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            positions=model.context,
            seed=training.seed,
            dtype=parallel.dtype,
        )
        self.model, self.loss = GPT(sizes, self.parallelism), CrossEntropy(self.parallelism)
        self.optimizer = AdamW(self.model.parameters(), weight_decay=training.weight_decay, clip=training.clip)

    @property
    def parameters(self) -> int:
        """The number of weights of the whole model."""
        return sum(parameter.value.size for parameter in self.optimizer.parameters)

    def gradients(self, step: int) -> float:
        """Leave the gradients of a step in the parameters and return its loss, in nats per token."""
        training, context = self.config.training, self.config.model.context
        first, loss = step * training.batch, 0.0
        for i in range(training.microbatches):
            low, high = part(training.batch, training.microbatches, i)
            starts = data.sample_starts(first + low, first + high, len(self.corpus.train), context, training.seed)
            x, labels = self._sequences(self.corpus.train, starts)
            ctx = Context(step=step, microbatch=i, sample=low)
            logits, cache = self.model.forward(x, ctx)
            value, saved = self.loss.forward(logits, labels, training.batch * context)
            self.model.backward(self.loss.backward(saved), cache)
            loss += value
        return loss

    def _sequences(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[DistArray, DistArray]:
        return data.sequences(tokens, starts, self.config.model.context, self.grid, self.parallelism.tokens())

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        t = self.config.training
        return warmup_cosine(step, peak=t.lr, warmup=t.warmup, total=t.steps)

    def step(self, step: int) -> dict[str, float]:
        """Do a training step and return its loss, gradient norm and learning rate."""
        loss, lr = self.gradients(step), self.learning_rate(step)
        return {"loss": loss, "gradient_norm": self.optimizer.step(lr), "learning_rate": lr}

    def validate(self) -> float:
        """Return the loss over sequences spread evenly over the held-out text, in nats per token."""
        t, context = self.config.training, self.config.model.context
        starts = data.spread_starts(t.evaluate_batches * t.batch, len(self.corpus.validation), context)
        loss = 0.0
        for some in np.split(starts, t.evaluate_batches):
            x, labels = self._sequences(self.corpus.validation, some)
            logits, _ = self.model.forward(x, Context(train=False))
            loss += self.loss.forward(logits, labels, len(starts) * context)[0]
        return loss

    def generate(self, prompt: bytes, count: int, temperature: float = 0.8) -> bytes:
        """Return `prompt` continued by `count` sampled bytes, the same on any grid up to rounding."""
        tokens, context = list(prompt), self.config.model.context
        for i in range(count):
            window = np.array([tokens[-context:]])
            x = from_global(window, self.grid, self.parallelism.tokens())
            logits, _ = self.model.forward(x, Context(train=False))
            whole = logits.gather()
            assert whole is not None
            draw = random.uniform_block(((i, i + 1),), (count,), self.config.training.seed, "sample")[0]
            tokens.append(_choose(whole[0, -1, :256] / temperature, draw))
        return bytes(tokens)

    def save(self, directory: Path, step: int) -> None:
        """Write a checkpoint of the state after `step` steps."""
        metadata = {"step": step, "config": self.config.model_dump(), "model": models.describe(self.model)}
        checkpoint.save(directory, self._state(), metadata, self.grid)
        with comm.agreed(self.grid):
            if self.grid.rank == 0:
                checkpoint.point_latest(directory)

    def restore(self, directory: Path) -> int:
        """Take the state of a checkpoint, of any grid and mode, and return the number of steps behind it."""
        metadata = checkpoint.load(directory, self._state(), self.grid)
        self.optimizer.steps = int(metadata["step"])
        return self.optimizer.steps

    def _state(self) -> dict[str, Any]:
        weights = {f"weights/{p.name}": p.value for p in self.optimizer.parameters}
        return weights | {f"optimizer/{name}": array for name, array in self.optimizer.state().items()}


def _choose(logits: np.ndarray, draw: float) -> int:
    """Return the index at which the cumulative softmax of `logits` passes `draw`."""
    weights = np.cumsum(np.exp(logits.astype(np.float64) - logits.max()))
    return int(min(np.searchsorted(weights, draw * weights[-1], side="right"), len(weights) - 1))
