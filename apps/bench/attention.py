"""``colossal-mpi bench attention``: memory and time of attention, forward and backward, as the sequence grows."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import typer

from colossal_mpi.apps.bench import harness
from colossal_mpi.apps.bench.harness import Benchmark, Column, Row, number
from colossal_mpi.apps.command import JsonFile
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import world_size
from colossal_mpi.layers import kernels

_DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Attention(Benchmark):
    """Measure the memory and time of attention as the sequence grows.

    A measurement is one forward and one backward pass of the reference kernel on one thread.
    """

    name = "attention"
    example = "colossal-mpi bench attention --sequence 4096 --heads 32 --groups 8"

    sequence: Annotated[list[int], typer.Option(help="Tokens; may be repeated.")] = field(
        default_factory=lambda: [2**i for i in range(10, 15)]
    )
    heads: Annotated[int, typer.Option(help="Heads of the queries.")] = 4
    groups: Annotated[int | None, typer.Option(help="Heads of keys and values; by default as many.")] = None
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(_DTYPES)}.")] = "float32"
    causal: Annotated[bool, typer.Option(help="Whether a query sees only its own and earlier keys.")] = True
    json: JsonFile = None

    def __post_init__(self) -> None:
        sizes = {"heads": self.heads, "groups": self.key_heads, "width": self.width}
        if min(*self.sequence, *sizes.values()) < 1 or self.heads % self.key_heads:
            given = ", ".join(f"--{name} {value}" for name, value in sizes.items())
            raise ConfigError(f"bench attention {given}: at least 1 of each, and groups that divide heads")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: use {' or '.join(_DTYPES)}")
        harness.check_common(self)

    @property
    def key_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.heads if self.groups is None else self.groups

    @property
    def job_size(self) -> int:
        return world_size()

    def measure(self) -> Iterator[list[Row]]:
        yield [self._row(sequence) for sequence in self.sequence]

    def _row(self, sequence: int) -> Row:
        """Return the time of both passes, and the memory that is traced in a second run."""
        rng = np.random.default_rng(0)
        shapes = [(1, sequence, heads, self.width) for heads in (self.heads, self.heads, *2 * [self.key_heads])]
        do, q, k, v = (rng.standard_normal(shape).astype(self.dtype) for shape in shapes)
        reference = kernels.load("reference")

        def work() -> None:
            out, statistics = reference.attention(q, k, v, self.causal)
            reference.attention_backward(do, q, k, v, out, statistics, self.causal)

        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return {
            "sequence": sequence,
            "seconds": seconds,
            "peak": peak,  # bytes beyond queries, keys, values and the gradient of the output
            "scores": sequence**2 * self.heads * q.itemsize,  # bytes of an array of all scores
            "heads": self.heads,
            "groups": self.key_heads,
            "width": self.width,
            "dtype": self.dtype,
            "causal": self.causal,
        }

    def show(self, rows: list[Row]) -> None:
        columns = (
            number("sequence", "sequence", "d"),
            number("seconds", "seconds", ".3f"),
            number("peak MiB", "peak", ".1f", scale=2**-20),
            Column("bytes a token", lambda row: f"{row['peak'] / row['sequence']:.0f}"),
            number("all scores MiB", "scores", ".1f", scale=2**-20),
        )
        heads = f"{self.heads} heads, {self.key_heads} for keys and values, width {self.width}"
        title = f"attention of {heads}, {self.dtype}"
        harness.show(title, columns, rows, ["peak: beyond queries, keys, values and the gradient of the output"], 80)
