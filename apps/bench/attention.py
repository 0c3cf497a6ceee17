"""``colossal-mpi bench attention``: memory and time of attention, forward and backward, as the sequence grows."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import threadpoolctl
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from colossal_mpi.apps.command import Command, JsonFile
from colossal_mpi.apps.files import check_writable
from colossal_mpi.errors import ConfigError
from colossal_mpi.layers import kernels


@dataclass(frozen=True)
class Sizes:
    """Of the heads of one sequence."""

    heads: int = 4
    groups: int = 4
    width: int = 64
    dtype: str = "float32"
    causal: bool = True


@dataclass(frozen=True)
class Row:
    """What a sequence takes."""

    sequence: int
    seconds: float
    """Of forward and backward, on one thread."""
    peak: int
    """Greatest bytes in use, beyond queries, keys, values and the output's cotangent."""
    scores: int
    """Bytes that one array of all scores would have."""


def measure(sequence: int, sizes: Sizes) -> Row:
    """Return what forward and backward of the reference kernel take; memory is traced in a second run."""
    rng = np.random.default_rng(0)
    do, q = (rng.standard_normal((1, sequence, sizes.heads, sizes.width)).astype(sizes.dtype) for _ in range(2))
    k, v = (rng.standard_normal((1, sequence, sizes.groups, sizes.width)).astype(sizes.dtype) for _ in range(2))

    reference = kernels.load("reference")

    def work() -> None:
        out, statistics = reference.attention(q, k, v, sizes.causal)
        reference.attention_backward(do, q, k, v, out, statistics, sizes.causal)

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Row(sequence, seconds, peak, sequence**2 * sizes.heads * q.itemsize)


def main(sequences: Sequence[int], sizes: Sizes, file: Path | None = None) -> int:
    """Measure each sequence, show the rows and write them to a JSON file; return an exit code.

    Raises
    ------
    ConfigError
        If a size is below 1, or the groups do not divide the heads.
    """
    if min(*sequences, sizes.heads, sizes.groups, sizes.width) < 1 or sizes.heads % sizes.groups:
        raise ConfigError(
            f"bench attention {sizes}, sequences {sequences}: 1 or more of each, groups that divide heads"
        )
    if sizes.dtype not in ("float32", "float64"):
        raise ConfigError(f"--dtype {sizes.dtype}: use float32 or float64")
    check_writable(file)
    table = Table("sequence", "seconds", "peak MiB", "bytes a token", "all scores MiB", box=box.SIMPLE)
    rows = [measure(sequence, sizes) for sequence in sequences]
    for row in rows:
        shown = row.sequence, f"{row.seconds:.3f}", f"{row.peak / 2**20:.1f}", round(row.peak / row.sequence)
        table.add_row(*map(str, shown), f"{row.scores / 2**20:.1f}")
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps([{**asdict(row), **asdict(sizes)} for row in rows], indent=1) + "\n")
    return 0


@dataclass(frozen=True, kw_only=True)
class Attention(Command):
    """Measure the memory and time of attention as the sequence grows.

    A measurement is one forward and one backward pass on one thread.
    """

    example = "colossal-mpi bench attention --sequence 4096 --heads 32 --groups 8"

    sequence: Annotated[list[int], typer.Option(help="Tokens; may be repeated.")] = field(
        default_factory=lambda: [2**i for i in range(10, 15)]
    )
    heads: Annotated[int, typer.Option(help="Heads of the queries.")] = 4
    groups: Annotated[int | None, typer.Option(help="Heads of keys and values; by default as many.")] = None
    width: Annotated[int, typer.Option(help="Width of a head.")] = 64
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32"
    causal: Annotated[bool, typer.Option(help="Whether a query sees only its own and earlier keys.")] = True
    json: JsonFile = None

    def run(self) -> int:
        groups = self.heads if self.groups is None else self.groups
        return main(self.sequence, Sizes(self.heads, groups, self.width, self.dtype, self.causal), self.json)
