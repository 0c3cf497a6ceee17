"""What a training step of a task gives to a pipeline."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from colossal_mpi.apps.training.tasks import Batch, Task
from colossal_mpi.layers import Context
from colossal_mpi.layers.pipeline.stage import Stream
from colossal_mpi.layout import part


class StepFeed:
    """The microbatches of a step of a task; every rank makes its own part of each.

    Parameters
    ----------
    task : Task
    step : int
    scale : float
        Of the loss in the backward pass.
    """

    def __init__(self, task: Task, step: int, scale: float = 1.0) -> None:
        training, self.scale = task.config.training, scale
        self.task, self.step, self.size, self.microbatches = task, step, training.batch, training.microbatches
        self._batch = lru_cache(maxsize=1)(self._made)
        self.own: list[dict[str, float]] = []
        """Of each forward pass of a microbatch through some layers the losses that these have added."""

    def _made(self, microbatch: int) -> Batch:
        low, high = self._range(microbatch)
        first = self.step * self.size
        return self.task.batch(first + low, first + high)

    def _range(self, microbatch: int) -> tuple[int, int]:
        return part(self.size, self.microbatches, microbatch)

    def context(self, microbatch: int) -> Context:
        """Return step, samples and what the task's batch has besides."""
        low, high = self._range(microbatch)
        share, rest = (high - low) / self.size, self._batch(microbatch).context
        self.own.append({})
        given = Context(step=self.step, microbatch=microbatch, sample=low, losses=self.own[-1])
        return replace(given, share=share, scale=self.scale, **rest)

    def inputs(self, microbatch: int) -> Any:
        """Return the inputs of the model."""
        return self._batch(microbatch).inputs

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        """Return the microbatch's share of the loss, and what `loss_backward` needs."""
        return self.task.loss(y, self._batch(microbatch).labels, self.size)

    def loss_backward(self, cache: Any) -> Any:
        """Return the cotangent of the outputs, times the loss scale."""
        return self.task.backward(cache, self.scale)

    def stream(self, microbatch: int) -> Stream:
        """Return shape, layout and dtype of the residual stream."""
        low, high = self._range(microbatch)
        return self.task.stream(high - low)
