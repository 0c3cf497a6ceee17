"""One training run: a task and its optimizer, stepped, validated, saved and resumed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import checkpoint, comm, ledger
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.environment import peak_memory
from colossal_mpi.apps.training import tasks
from colossal_mpi.apps.training.tasks import StepFeed
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, kernels, models, precision, recompute
from colossal_mpi.layers.optim import OPTIMIZERS, LearningRateSchedule, MovingAverage
from colossal_mpi.layers.pipeline import PIPE, SCHEDULES, Pipeline, parameter_names, partition, stage_grid
from colossal_mpi.platform import backend

OWN_LOSSES = ("balance", "z_loss")
"""What mixtures of experts add to the loss, by the ends of the names that they report."""


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
        self.before = peak_memory()
        """Bytes that the process had at most before there was a model, the library of its kernels included."""
        place = Parallelism(
            stage_grid(grid), parallel.tensor, parallel.keep_gathered, parallel.zero, sequence=parallel.sequence
        )
        self.task = tasks.make(config, place)
        self.model, self.task.run = self.task.model, self.run
        whole = recompute(self.model, parallel.recompute, SCHEDULES[parallel.schedule].defers_weights)
        chunks = partition(whole, grid, parallel.virtual_stages)
        names = parameter_names(whole, grid, parallel.virtual_stages)
        self.pipeline = self.task.pipeline = Pipeline(chunks, grid, parallel.schedule, parallel.bucket, names)
        self.optimizer = OPTIMIZERS[training.optimizer](
            self.pipeline.parameters(),
            weight_decay=training.weight_decay,
            clip=training.clip,
            offload=parallel.offload,
            **training.optimizer_arguments(),
        )
        self.average = MovingAverage(self.optimizer.parameters, training.average) if training.average else None
        self.own: dict[str, float] = {}
        """What experts have added to the loss of the last step."""
        self.learning_rate = LearningRateSchedule(
            training.rate, training.lr, training.steps, training.warmup, **training.rate_arguments()
        )
        """Of a step."""
        self.saving = checkpoint.AsyncCheckpointer(grid)

    @property
    def parameters(self) -> int:
        """The number of weights of the whole model."""
        return sum(math.prod(parameter.shape) for parameter in self.model.parameters())

    def gradients(self, step: int) -> float:
        """Leave the gradients of a step in the parameters and return its loss, in nats, with what experts add."""
        feed = StepFeed(self.task, step, self.optimizer.loss_scale)
        with precision.overflowing() if self.optimizer.scaling else nullcontext():
            loss = self.pipeline.step(feed)
        self.own = self._of_experts(feed.own)
        return loss + sum(self.own.values())

    def _of_experts(self, reported: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return the sums of the losses of all stages' experts. **Communication:** two words along ``pipe``."""
        if not getattr(self.config.model, "experts", 0):
            return {}
        each = [(name.rpartition(".")[2], value) for one in reported for name, value in one.items()]
        sums = [sum(x for found, x in each if found == kind) for kind in OWN_LOSSES]
        stages = (PIPE,) if PIPE in self.grid.axes else ()
        own = self.grid.to_block(np.array(sums, np.float64))  # without experts on a stage the sums are integers
        totals = backend.to_host(comm.allreduce(own, self.grid, stages))
        return {f"expert_{kind}": float(total) for kind, total in zip(OWN_LOSSES, totals, strict=True)}

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are their moving averages, if these are kept."""
        return nullcontext() if self.average is None else self.average.applied()

    def run(self, x: Any, ctx: Context) -> Any:
        """Return the outputs of the model, on all stages."""
        length = x.shape[1] if x.ndim == 2 else None
        return self.pipeline.outputs(x, ctx, self.task.activation_spec(x.shape[0], length))

    def step(self, step: int, meanwhile: Callable[[], None] | None = None) -> dict[str, float | None]:
        """Do a training step and return its loss, what experts have added to it, gradient norm and learning rate.

        With 16-bit floats it returns the loss scale, too, and a norm of None is that of a step which was left out,
        because scaled gradients were too large. `meanwhile` is called between gradients and update, whose reductions
        hide a message that it begins.
        """
        loss, lr, scale = self.gradients(step), self.learning_rate(step), self.optimizer.loss_scale
        if meanwhile:
            meanwhile()
        self.saving.settle()
        with ledger.span("update"):
            norm = self.optimizer.step(lr)
            if self.average is not None:
                self.average.update()
        left_out = scale > 1 and not math.isfinite(norm)
        row = {"loss": loss, **self.own, "gradient_norm": None if left_out else norm, "learning_rate": lr}
        return row if self.optimizer.scaling is None else row | {"loss_scale": scale}

    def validate(self) -> dict[str, float]:
        """Return the loss over the held-out samples, and the share of them that meets each measure of the task.

        Of the averages of the weights, where these are kept.
        """
        loss, shares, held = 0.0, Counter[str](), self.task.held
        with self.averaged():
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

    @property
    def copies(self) -> int:
        """Bytes of host memory that background checkpoints copy the state of this rank to, 0 if there are none."""
        return checkpoint.owned_bytes(self._state(counted=True)) if self.saves_meanwhile() else 0

    def saves_meanwhile(self, done: int = 0) -> bool:
        """Say whether a run from `done` steps on writes a checkpoint in the background; never the last one."""
        training = self.config.training
        return training.background_checkpoints and done + training.checkpoint_every < training.steps

    def reserve(self) -> None:
        """Take the memory for the copies of background checkpoints, so that the first is as quick as the others."""
        self.saving.reserve(self._state(counted=True))

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
        if self.average is not None:
            self.average.updates = int(metadata["step"])
        return int(metadata["step"])

    def _state(self, counted: bool = False) -> dict[str, Any]:
        """Return this stage's arrays by name; without copies of weights that another stage has, if `counted`."""
        parameters = [p for p in self.optimizer.parameters if p.counted or not counted]
        weights = {f"weights/{name}": array for name, array in self.optimizer.weights(parameters).items()}
        if self.average is not None:
            weights |= {f"average/{p.name}": self.average.averages[p.name] for p in parameters}
        return weights | {f"optimizer/{name}": array for name, array in self.optimizer.state(parameters).items()}
