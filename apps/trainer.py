"""One training run: a task and its optimizer, stepped, validated, saved and resumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from colossal_mpi import checkpoint, comm
from colossal_mpi.apps import tasks
from colossal_mpi.apps.config import Config
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, kernels, models
from colossal_mpi.layers.optim import OPTIMIZERS
from colossal_mpi.layers.rates import Rate
from colossal_mpi.layout import part


class Trainer:
    """A task and its optimizer on a grid; everything random is a function of the seed.

    Parameters
    ----------
    config : Config
    grid : Grid
    """

    def __init__(self, config: Config, grid: Grid) -> None:
        parallel, training = config.parallel, config.training
        self.config, self.grid = config, grid
        self.kernels = kernels.use(parallel.kernels, grid)
        self.task = tasks.make(config, Parallelism(grid, parallel.tensor, parallel.keep_gathered, parallel.zero))
        self.model = self.task.model
        self.optimizer = OPTIMIZERS[training.optimizer](
            self.model.parameters(), weight_decay=training.weight_decay, clip=training.clip
        )
        self.learning_rate = Rate(
            training.rate,
            training.lr,
            training.steps,
            training.warmup,
            training.floor,
            milestones=tuple(training.milestones),
        )
        """Of a step."""

    @property
    def parameters(self) -> int:
        """The number of weights of the whole model."""
        return sum(parameter.value.size for parameter in self.optimizer.parameters)

    def gradients(self, step: int) -> float:
        """Leave the gradients of a step in the parameters and return its loss, in nats."""
        training, task = self.config.training, self.task
        first, loss = step * training.batch, 0.0
        for i in range(training.microbatches):
            low, high = part(training.batch, training.microbatches, i)
            batch = task.batch(first + low, first + high)
            share = (high - low) / training.batch
            ctx = Context(step=step, microbatch=i, sample=low, share=share, **batch.context)
            outputs, cache = self.model.forward(batch.inputs, ctx)
            value, saved = task.loss(outputs, batch.labels, training.batch)
            self.model.backward(task.backward(saved), cache)
            loss += value
        return loss

    def step(self, step: int) -> dict[str, float]:
        """Do a training step and return its loss, gradient norm and learning rate."""
        loss, lr = self.gradients(step), self.learning_rate(step)
        return {"loss": loss, "gradient_norm": self.optimizer.step(lr), "learning_rate": lr}

    def validate(self) -> dict[str, float]:
        """Return the loss over the held-out samples, and the share of them that meets each measure of the task."""
        loss, shares, held = 0.0, Counter[str](), self.task.held
        for batch in self.task.held_out():
            outputs, _ = self.model.forward(batch.inputs, Context(train=False, **batch.context))
            loss += self.task.loss(outputs, batch.labels, held)[0]
            shares.update(self.task.measures(outputs, batch.labels, held))
        return {"val_loss": loss, **{f"val_{name.replace(' ', '_')}": share for name, share in shares.items()}}

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
