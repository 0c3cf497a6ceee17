"""What the trainer knows of a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from colossal_mpi.apps.config.load import Config
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import Context, Parallelism, Sequential
from colossal_mpi.layers.pipeline.model import Pipeline
from colossal_mpi.layers.pipeline.stage import Stream


@dataclass(frozen=True)
class Batch:
    """Some samples: what the model takes and what the loss compares its outputs to."""

    inputs: Any
    labels: Any
    context: Mapping[str, Any] = field(default_factory=dict)
    """What the layers' context has of the samples: ``mask``, ``segments`` and ``order``."""


class Task:
    """Base of all tasks: a model, its loss, and samples that are functions of the seed and their global number.

    Every rank calls every method, with the same arguments; each makes its own part of the arrays.

    Attributes
    ----------
    model : Sequential
        Its `forward` takes the inputs of a batch.
    name : str
        What the model is called.
    about : str
        The data, in words and numbers.
    unit : str
        What is counted for the speed, in the plural; `per_sample` of them are in a sample.
    per : str
        What the loss is a mean over, in the singular.
    length : int
        Positions of the residual stream.
    tokenizer : str
        The JSON of what its text was made into tokens with, ``""`` for bytes.
    held : int
        Samples that a validation takes, all together.
    """

    model: Sequential
    name: str
    about: str
    unit: str
    per: str
    tokenizer: str = ""
    per_sample: int
    length: int
    held: int

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        self.config, self.parallelism, self.grid = config, parallelism, parallelism.grid
        self.run: Callable[[Any, Context], Any] = lambda x, ctx: self.model.forward(x, ctx)[0]
        """The model without its backward pass; the trainer puts its own here where the model is cut into stages."""
        self.pipeline: Pipeline | None = None
        """Where the model is cut into stages, the trainer's."""

    def stream(self, samples: int, length: int | None = None) -> Stream:
        """Return global shape, layout and dtype of the residual stream of some samples, of all positions by default."""
        length = self.length if length is None else length
        return (samples, length, self.config.model.hidden), self.parallelism.stream(), self.config.parallel.dtype

    def batch(self, first: int, stop: int) -> Batch:
        """Return the training samples number `first` to `stop`, counted from the start of the run."""
        raise NotImplementedError

    def held_out(self) -> Iterator[Batch]:
        """Yield the `held` samples of a validation."""
        raise NotImplementedError

    def loss(self, outputs: Any, labels: Any, samples: int) -> tuple[float, Any]:
        """Return this batch's part of the mean loss over `samples` samples, in nats, and what `backward` needs."""
        raise NotImplementedError

    def backward(self, saved: Any, scale: float = 1.0) -> Any:
        """Return the cotangent of the outputs, times a loss scale."""
        raise NotImplementedError

    def measures(self, outputs: Any, labels: Any, samples: int) -> Mapping[str, float]:
        """Return this batch's part of each measure over `samples` samples that is a share, by name."""
        return {}

    def sample(self, count: int) -> bytes:
        """Return about `count` bytes of text that show what the model can do."""
        raise NotImplementedError


def whole(array: DistArray) -> np.ndarray:
    """Return a global array, which must be small, on every rank."""
    gathered = array.gather()
    assert gathered is not None
    return gathered
