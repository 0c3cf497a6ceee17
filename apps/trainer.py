"""One training run: a task and its optimizer, stepped, validated, saved and resumed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from colossal_mpi import checkpoint, comm, ledger
from colossal_mpi.apps import tasks
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.feed import StepFeed
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, kernels, models, precision, recompute
from colossal_mpi.layers.optim import OPTIMIZERS
from colossal_mpi.layers.pipeline import Pipeline, cut, place_of
from colossal_mpi.layers.rates import Rate


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
        place = Parallelism(
            place_of(grid), parallel.tensor, parallel.keep_gathered, parallel.zero, sequence=parallel.sequence
        )
        self.task = tasks.make(config, place)
        self.model, self.task.run = self.task.model, self.run
        chunks = cut(
            recompute(self.model, parallel.recompute, parallel.schedule == "zero-bubble"), grid, parallel.virtual_stages
        )
        self.pipeline = Pipeline(chunks, grid, parallel.schedule)
        self.optimizer = OPTIMIZERS[training.optimizer](
            self.pipeline.parameters(), weight_decay=training.weight_decay, clip=training.clip, offload=parallel.offload
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
        self.saving = checkpoint.Background(grid)

    @property
    def parameters(self) -> int:
        """The number of weights of the whole model."""
        return sum(math.prod(parameter.shape) for parameter in self.model.parameters())

    def gradients(self, step: int) -> float:
        """Leave the gradients of a step in the parameters and return its loss, in nats."""
        with precision.overflowing() if self.optimizer.scaling else nullcontext():
            return self.pipeline.step(StepFeed(self.task, step, self.optimizer.loss_scale))

    def run(self, x: Any, ctx: Context) -> Any:
        """Return the outputs of the model, on all stages."""
        length = x.shape[1] if x.ndim == 2 else None
        return self.pipeline.outputs(x, ctx, self.task.stream(x.shape[0], length))

    def step(self, step: int, meanwhile: Callable[[], None] | None = None) -> dict[str, float | None]:
        """Do a training step and return its loss, gradient norm and learning rate, with 16-bit floats the loss scale.

        A norm of None is that of a step which was left out, because scaled gradients were too large. `meanwhile` is
        called between gradients and update, whose reductions hide a message that it begins.
        """
        loss, lr, scale = self.gradients(step), self.learning_rate(step), self.optimizer.loss_scale
        if meanwhile:
            meanwhile()
        self.saving.settle()
        with ledger.span("update"):
            norm = self.optimizer.step(lr)
        left_out = scale > 1 and not math.isfinite(norm)
        row = {"loss": loss, "gradient_norm": None if left_out else norm, "learning_rate": lr}
        return row if self.optimizer.scaling is None else row | {"loss_scale": scale}

    def validate(self) -> dict[str, float]:
        """Return the loss over the held-out samples, and the share of them that meets each measure of the task."""
        loss, shares, held = 0.0, Counter[str](), self.task.held
        for batch in self.task.held_out():
            outputs = self.run(batch.inputs, Context(train=False, **batch.context))
            loss += self.task.loss(outputs, batch.labels, held)[0]
            shares.update(self.task.measures(outputs, batch.labels, held))
        return {"val_loss": loss, **{f"val_{name.replace(' ', '_')}": share for name, share in shares.items()}}

    def save(
        self, directory: Path, step: int, after: Callable[[], None] | None = None, background: bool = False
    ) -> None:
        """Write a checkpoint of the state after `step` steps.

        Parameters
        ----------
        directory : path
        step : int
        after : callable, optional
            What rank 0 does when the checkpoint is whole; ``latest`` points to it by default.
        background : bool
            Return at once, and write while the next steps are done: ``saving.poll()`` goes after each of them, and
            ``saving.finish()`` after the last.
        """
        metadata, after = self._metadata(step), after or partial(checkpoint.point_latest, directory)
        state, values = self._state(counted=True), self._values(step)
        if background:
            self.saving.begin(directory, state, metadata, values=values, after=after)
            return
        self.saving.finish()
        checkpoint.save(directory, state, metadata, self.grid, values=values)
        with comm.agreed(self.grid):
            if self.grid.rank == 0:
                after()

    def _metadata(self, step: int) -> dict[str, Any]:
        model = models.describe(self.model)
        if self.optimizer.scaling is not None:
            model["dtype"] = "float32"  # that of the masters, which are what is saved
        return {
            "step": step,
            "config": self.config.model_dump(),
            "model": model,
            "optimizer": {
                "steps": self.optimizer.steps,
                "loss_scale": self.optimizer.scaling and self.optimizer.scaling.state(),
            },
        }

    def _values(self, step: int) -> dict[str, tuple[Any, str]]:
        """Return what besides the arrays the next steps depend on, and its units: all are functions of these."""
        training = self.config.training
        scaling = self.optimizer.scaling
        scale = {} if scaling is None else {"training/loss_scale": (self.optimizer.loss_scale, "1")}
        return scale | {
            "training/step": (step, "steps"),
            "training/samples": (step * training.batch, "samples"),
            "training/seed": (training.seed, "1"),
            "training/rate": (training.rate, "name of the schedule of the learning rate"),
            "training/learning_rate": (self.learning_rate(step), "of the next step"),
        }

    def restore(self, directory: Path) -> int:
        """Take the state of a checkpoint, of any grid and mode, and return the number of steps behind it."""
        metadata = checkpoint.load(directory, self._state(), self.grid)
        optimizer = metadata.get("optimizer", {"steps": metadata["step"], "loss_scale": None})
        self.optimizer.steps = int(optimizer["steps"])
        if self.optimizer.scaling is not None and optimizer["loss_scale"]:
            self.optimizer.scaling.restore(optimizer["loss_scale"])
        self.optimizer.refresh()
        return int(metadata["step"])

    def _state(self, counted: bool = False) -> dict[str, Any]:
        """Return this stage's arrays by name; without copies of weights that another stage has, if `counted`."""
        parameters = [p for p in self.optimizer.parameters if p.counted or not counted]
        weights = {f"weights/{name}": array for name, array in self.optimizer.weights(parameters).items()}
        return weights | {f"optimizer/{name}": array for name, array in self.optimizer.state(parameters).items()}
