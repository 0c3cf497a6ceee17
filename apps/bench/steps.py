"""Training steps of one GPT: ours with either provider of local maths, and PyTorch's own on one rank."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi.apps.bench import timing
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Context, Parallelism, kernels
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.optim import AdamW

OPTIMISER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY = 0.1
CLIP = 1.0


@dataclass(frozen=True)
class Sizes:
    """Of the model and a step."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    sequence: int = 128
    batch: int = 8
    vocabulary: int = 256

    @property
    def tokens(self) -> int:
        """The tokens of a step."""
        return self.batch * self.sequence

    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids and the labels of every step, ``[b, s]``."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, self.vocabulary, (self.batch, self.sequence + 1))
        return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, width {self.hidden}, {self.heads} heads, {self.batch} x {self.sequence} tokens of "
            f"{self.vocabulary}"
        )


class Step(ABC):
    """One way to do forward pass, backward pass, clipping and AdamW in float32."""

    name: str
    threads = 1
    """Of each rank."""

    def __init__(self, group: MPI.Intracomm | None) -> None:
        self.group = group
        """Of the ranks that work; None on the others, which sleep."""

    @abstractmethod
    def do(self) -> float:
        """Train one step and return its loss."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make what has to hold during a step."""
        yield


class Ours(Step):
    """The GPT of `layers` on a grid."""

    def __init__(self, provider: str, sizes: Sizes, grid: Grid, tensor: str) -> None:
        super().__init__(grid.comm(tuple(grid.axes)))
        self.name, self.provider, self.sizes, self.grid = provider, provider, sizes, grid
        p = Parallelism(grid, tensor)
        config = GPTConfig(
            vocabulary=sizes.vocabulary,
            layers=sizes.layers,
            hidden=sizes.hidden,
            heads=sizes.heads,
            positions=sizes.sequence,
        )
        self.model, self.loss = GPT(config, p), CrossEntropy(p)
        self.optimizer = AdamW(self.model.parameters(), weight_decay=DECAY, clip=CLIP, **OPTIMISER)
        self.ids, self.labels = (from_global(a, grid, p.tokens()) for a in sizes.sequences())

    def weights(self) -> Mapping[str, DistArray]:
        """Return the weights by name."""
        return {p.name: p.value for p in self.optimizer.parameters}

    def do(self) -> float:
        """Train one step and return its loss."""
        logits, cache = self.model.forward(self.ids, Context())
        loss, saved = self.loss.forward(logits, self.labels, self.sizes.tokens)
        self.model.backward(self.loss.backward(saved), cache)
        self.optimizer.step()
        return loss

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Take the kernels of this provider."""
        kernels.use(self.provider, self.grid)
        yield
        kernels.use("reference", self.grid)


class PyTorch(Step):
    """PyTorch eager on rank 0, with as many threads as there are ranks with cores; the other ranks sleep."""

    name = "pytorch"

    def __init__(self, sizes: Sizes, weights: Mapping[str, DistArray]) -> None:
        first = MPI.COMM_WORLD.rank == 0
        super().__init__(MPI.COMM_SELF if first else None)
        node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self._cores = timing.cores(node)
        node.Free()
        self.threads = min(MPI.COMM_WORLD.size, len(self._cores))
        whole = {name: array.gather(0) for name, array in weights.items()}
        if first:
            from colossal_mpi.apps.bench.torch_gpt import Trainer

            self._trainer = Trainer(sizes, whole)

    def do(self) -> float:
        """Train one step and return its loss."""
        return self._trainer.step()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use all those threads."""
        if self.group is None:
            yield
            return
        with timing.blas_threads(self.threads, self._cores), self._trainer.threads(self.threads):
            yield


def peers() -> tuple[str, ...]:
    """Return the names of all competitors that can be here."""
    return ("pytorch", "reference", "torch") if importlib.util.find_spec("torch") else ("reference",)
