"""``colossal-mpi bench train``: the tokens per second of a GPT's training step, beside PyTorch eager.

`Train` lets each provider of local kernels and PyTorch take turns. All of them start from the same weights, and the
losses of the first steps must agree.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from mpi4py import MPI

from colossal_mpi.apps import config as configs
from colossal_mpi.apps.bench import harness, node, timing
from colossal_mpi.apps.bench.gpt import GPTBenchmark
from colossal_mpi.apps.bench.harness import Column, Competitor, Row, number
from colossal_mpi.apps.command import GridAxes, JsonFile
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import MODES, Context, CrossEntropy, Parallelism, kernels
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.optim import AdamW

OPTIMIZER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8}
"""Options of AdamW, by the names of both implementations."""
DECAY, CLIP = 0.1, 1.0
TOLERANCE = 1e-4
"""Greatest relative difference of a loss to PyTorch's, in float32, in the first steps."""
_PYTORCH = "pytorch"


def competitors() -> tuple[str, ...]:
    """Return the names of all competitors that can run here: PyTorch, and each provider of kernels."""
    found = [name for name, one in kernels.PROVIDERS.items() if not one.requires or _importable(one.requires)]
    return (*([_PYTORCH] if _importable("torch") else []), *found)


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True, kw_only=True)
class Train(GPTBenchmark):
    """Time the training step of a GPT beside PyTorch eager.

    A step is forward, backward, clipping and AdamW. All competitors take turns.
    """

    name = "train"
    example = "colossal-mpi bench train --hidden 512 --grid row=2,col=2 --tensor 2d"

    kernels: Annotated[
        list[str],
        typer.Option(help=f"{', '.join(competitors())}; may be repeated. By default all.", show_default=False),
    ] = field(default_factory=list)
    grid: GridAxes = None
    tensor: Annotated[str, typer.Option(help=f"Tensor mode: {', '.join(MODES)}.")] = "none"
    repeat: Annotated[int, typer.Option(help="Rounds of all of them.")] = 15
    json: JsonFile = None

    def __post_init__(self) -> None:
        self.check_sizes()
        if unknown := [name for name in self.kernels if name not in competitors()]:
            raise ConfigError(f"--kernels {', '.join(unknown)}: use one of {', '.join(competitors())}")
        harness.check_common(self, self.repeat, 15)
        assert self.job_size  # parses --grid

    @property
    def axes(self) -> dict[str, int]:
        """The sizes of the axes of the grid: by default all ranks share the batch."""
        return configs.parse_grid(self.grid) if self.grid is not None else {"data": world_size()}

    @property
    def job_size(self) -> int:
        return math.prod(self.axes.values())

    def measure(self) -> Iterator[list[Row]]:
        os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch reads it at import; `threads` sets the number for its steps
        names, grid = tuple(dict.fromkeys(self.kernels)) or competitors(), Grid(None, "cpu", **self.axes)
        ours: list[Step] = [Ours(name, self, grid) for name in names if name != _PYTORCH]
        entries = ours
        if _PYTORCH in names:
            start = ours[0] if ours else Ours("reference", self, grid)
            assert isinstance(start, Ours)
            base = PyTorch(self, start.weights())
            entries = [base, *ours]
            for one in ours:
                one.base = base
        foreign = harness.compete(entries, self.repeat)
        rows = [self._row(one) | {"foreign": foreign} for one in entries]
        yield harness.with_ratios(rows, rows[0] if entries[0].name == _PYTORCH else None)

    def _row(self, entry: Step) -> Row:
        ours = isinstance(entry, Ours)
        return {
            "name": entry.name,
            **self.sizes,
            "grid": self.axes if ours else {},
            "tensor": self.tensor if ours else "none",
            "threads": entry.threads,
            **entry.figures(tokens_per_second=self.tokens),
            "loss_difference": entry.difference,
        }

    def show(self, rows: list[Row]) -> None:
        columns = (
            Column("name", lambda row: str(row["name"]), left=True),
            Column("where", _where, left=True),
            number("best s", "seconds", ".4f"),
            number("median s", "median_seconds", ".4f"),
            number("tokens/s", "tokens_per_second", ",.0f"),
            number("median", "median_tokens_per_second", ",.0f"),
            number("ratio", "ratio", ".3f"),
            number("median", "median_ratio", ".3f"),
        )
        sizes = f"{self.layers} layers, width {self.hidden}, {self.heads} heads, {self.batch} x {self.sequence} tokens"
        title = f"GPT of {sizes} of {self.vocabulary}, float32, {self.repeat} interleaved repeats"
        note = "a step: forward, backward, clipping and AdamW; ratio: to PyTorch's speed"
        harness.show(title, columns, rows, [note], width=100)


def _where(row: Row) -> str:
    grid = ",".join(f"{axis}={size}" for axis, size in row["grid"].items() if size > 1)
    return f"{row['tensor']} {grid}" if grid else f"{row['threads']} thread{'s' * (row['threads'] > 1)}"


class Step(Competitor):
    """One way to do forward pass, backward pass, clipping and AdamW in float32.

    Attributes
    ----------
    losses : list of float
        The loss of each step, on rank 0.
    base : Step or None
        The competitor whose losses it must have.
    difference : float or None
        The greatest relative difference of the first losses.
    """

    warm_up = 3

    def __init__(self, name: str, group: MPI.Intracomm | None, members: int) -> None:
        super().__init__(name, group, members)
        self.losses = list[float]()
        self.base: Step | None = None
        self.difference: float | None = None

    def step(self) -> float:
        """Train one step and return its loss."""
        raise NotImplementedError

    def work(self) -> None:
        self.losses.append(self.step())

    def check(self) -> str | None:
        if self.base is None:
            return None
        pairs = zip(self.losses[: self.warm_up], self.base.losses[: self.warm_up], strict=False)
        off: float = MPI.COMM_WORLD.bcast(max((abs(loss - exact) / exact for loss, exact in pairs), default=0.0))
        self.difference = off
        return None if off <= TOLERANCE else f"wrong: its losses differ from PyTorch's by {off:.1e}"


class Ours(Step):
    """The GPT of ``layers.models`` on a grid.

    Parameters
    ----------
    provider : str
        The provider of local kernels.
    options : Train
        The sizes and the tensor mode.
    grid : Grid
        The grid of all ranks.
    """

    def __init__(self, provider: str, options: Train, grid: Grid) -> None:
        super().__init__(provider, grid.comm(tuple(grid.axes)), grid.size)
        self.grid, self.tokens = grid, options.tokens
        p = Parallelism(grid, options.tensor)
        self.model, self.loss = GPT(options.model(tied=True), p), CrossEntropy(p)
        self.optimizer = AdamW(self.model.parameters(), weight_decay=DECAY, clip=CLIP, **OPTIMIZER)
        self.ids, self.labels = (from_global(a, grid, p.tokens()) for a in options.sequences())

    def weights(self) -> dict[str, DistArray]:
        """Return the weights by name."""
        return {p.name: p.value for p in self.optimizer.parameters}

    def step(self) -> float:
        logits, cache = self.model.forward(self.ids, Context())
        loss, saved = self.loss.forward(logits, self.labels, self.tokens)
        self.model.backward(self.loss.backward(saved), cache)
        self.optimizer.step()
        return loss

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Choose the kernels of its provider for the grid."""
        kernels.use(self.name, self.grid)
        yield
        kernels.use("reference", self.grid)


class PyTorch(Step):
    """PyTorch eager on rank 0, with as many threads as the ranks have cores; the other ranks sleep.

    Parameters
    ----------
    options : Train
        The sizes.
    weights : mapping of str to DistArray
        The first weights, by the names of ``layers.models.GPT``.
    """

    def __init__(self, options: Train, weights: Mapping[str, DistArray]) -> None:
        first = MPI.COMM_WORLD.rank == 0
        super().__init__(_PYTORCH, MPI.COMM_SELF if first else None, 1)
        self.difference = 0.0
        self._cores = node.cores()
        self.threads = min(MPI.COMM_WORLD.size, len(self._cores))
        whole = {name: array.gather(0) for name, array in weights.items()}
        if first:
            from colossal_mpi.apps.bench.torch_gpt import Trainer  # loads torch

            weights_here = {name: array for name, array in whole.items() if array is not None}
            self._trainer = Trainer(options, weights_here, OPTIMIZER, DECAY, CLIP)

    def step(self) -> float:
        return self._trainer.step()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use all its threads in a run."""
        if self.group is None:
            yield
            return
        with timing.blas_threads(self.threads, self._cores), self._trainer.threads(self.threads):
            yield
