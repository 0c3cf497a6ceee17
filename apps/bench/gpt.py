"""The GPT that ``bench train`` and ``bench pipeline`` run: its options, its configuration and its data."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, fields
from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
import typer

from colossal_mpi.apps.bench.harness import Benchmark
from colossal_mpi.errors import ConfigError
from colossal_mpi.layers.models import GPTConfig

Tokens: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True, kw_only=True)
class GPTBenchmark(Benchmark, ABC):
    """A benchmark whose options are the sizes of a GPT and of one of its training steps."""

    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 4
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 256
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 8
    vocabulary: Annotated[int, typer.Option(help="Size of the vocabulary.")] = 256

    def check_sizes(self, **least: int) -> None:
        """Raise `ConfigError` if a size is below 1, or below its least value, or the heads do not divide the width."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in (*self.sizes, *least):
                continue
            low = least.get(field.name, 1)
            if value < low:
                raise ConfigError(f"--{field.name} {value}: at least {low}, for example --{field.name} {field.default}")
        if self.hidden % self.heads:
            fitting = [str(n) for n in range(1, min(self.hidden, 4 * self.heads) + 1) if self.hidden % n == 0]
            raise ConfigError(f"--heads {self.heads} do not divide --hidden {self.hidden}: use {', '.join(fitting)}")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name, as a row has them."""
        return {field.name: getattr(self, field.name) for field in fields(GPTBenchmark)}

    @property
    def tokens(self) -> int:
        """The number of tokens of a step."""
        return self.batch * self.sequence

    def model(self, tied: bool) -> GPTConfig:
        """Return the configuration of the model, whose embedding and head share a weight if `tied`."""
        return GPTConfig(
            vocabulary=self.vocabulary,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            positions=self.sequence,
            tied=tied,
        )

    def sequences(self) -> tuple[Tokens, Tokens]:
        """Return the token ids and the labels of every step, ``[B, S]``."""
        rng = np.random.default_rng(0)
        ids = rng.integers(0, self.vocabulary, (self.batch, self.sequence + 1))
        return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
