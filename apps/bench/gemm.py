"""``colossal-mpi bench gemm``: the speed of every matrix product beside NumPy and ScaLAPACK.

`Gemm` makes the competitors of `product`, `distributed` and `scalapack`, and prints and draws their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from colossal_mpi.apps.bench import harness, scalapack
from colossal_mpi.apps.bench.distributed import Distributed, best_sizes
from colossal_mpi.apps.bench.harness import Benchmark, Column, Row, compete, number
from colossal_mpi.apps.bench.product import NumPy, Problem, Product, description
from colossal_mpi.apps.command import JsonFile
from colossal_mpi.errors import ConfigError
from colossal_mpi.linalg import ALGORITHMS

DTYPES = ("float64", "float32", "complex64", "complex128")
"""Names of the dtypes that the benchmark knows."""
PEERS = ("numpy", "scalapack")
"""Names of the competitors from other libraries."""
NAMES = (*PEERS, *ALGORITHMS, "auto")
"""Names of all competitors."""
_COLUMNS = (
    Column("name", lambda row: str(row["name"]), left=True),
    Column("grid", lambda row: place(row), left=True),
    number("best s", "seconds", ".4g"),
    number("median s", "median_seconds", ".4g"),
    number("GFlop/s", "gflops", ".1f"),
    number("median", "median_gflops", ".1f"),
    number("ratio", "ratio", ".3f"),
    number("median", "median_ratio", ".3f"),
    number("words/rank", "words", ","),
)


@dataclass(frozen=True, kw_only=True)
class Gemm(Benchmark):
    """Time every matrix product beside NumPy and ScaLAPACK.

    All of them take turns in one run. The exit code is 0 if at least one of them has a time: one that is wrong or does
    not fit the memory is a row with an error.
    """

    name = "gemm"
    example = "colossal-mpi bench gemm --size 2048 --size 8192,512,512 --plot gemm.png"

    size: Annotated[list[str], typer.Option(help="M,N,K, or one number for a cube; may be repeated.")] = field(
        default_factory=lambda: ["2048"]
    )
    ranks: Annotated[int | None, typer.Option(help="Ranks to start: 4 by default, unless under mpiexec.")] = None
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "float64"
    algorithm: Annotated[
        list[str],
        typer.Option(help=f"{', '.join(NAMES)}; may be repeated. By default all.", show_default=False),
    ] = field(default_factory=list)
    repeat: Annotated[int | None, typer.Option(help="Rounds of all of them. By default 10, and 1 s of each.")] = None
    json: JsonFile = None
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds to this file (PNG, PDF, SVG).")] = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: use one of {', '.join(DTYPES)}")
        if unknown := [name for name in self.algorithm if name not in NAMES]:
            raise ConfigError(f"--algorithm {', '.join(unknown)}: use one of {', '.join(NAMES)}")
        assert self.problems  # parses --size
        assert self.job_size
        harness.check_common(self, self.repeat)

    @property
    def job_size(self) -> int:
        return harness.job_size_of(self.ranks)

    @property
    def problems(self) -> list[Problem]:
        """The products."""
        return [_problem(size, np.dtype(self.dtype)) for size in self.size]

    def environment(self) -> AbstractContextManager[dict[str, str]]:
        return scalapack.environment()

    def measure(self) -> Iterator[list[Row]]:
        for problem in self.problems:
            yield self.measure_one(problem)

    def measure_one(self, problem: Problem) -> list[Row]:
        """Return a row for each competitor in a product. Collective over all ranks."""
        competitors, missing = self._competitors(problem)
        foreign = compete(competitors, self.repeat)
        rows = fastest([one.row() for one in competitors])
        if missing and "scalapack" in self.algorithm:  # asked for by name
            absent = dict.fromkeys(
                ("seconds", "median_seconds", "gflops", "median_gflops", "words", "residual", "ratio", "median_ratio")
            )
            fixed = {"threads": 1, "grid": {}, "note": "", "repeats": 0, "error": missing}
            rows.append({**description("scalapack", problem), **absent, **fixed})
        return [{**row, "foreign": foreign} for row in rows]

    def _competitors(self, problem: Problem) -> tuple[list[Product], str]:
        """Return the competitors, and why ScaLAPACK is not among them."""
        found, missing = list[Product](), ""
        for name in dict.fromkeys(self.algorithm) or NAMES:
            if name == "numpy":
                found.append(NumPy(problem))
            elif name != "scalapack":
                found.append(Distributed(name, problem, self.job_size))
            elif isinstance(library := scalapack.library(), str):
                missing = library
            else:
                grid = best_sizes("summa", problem, self.job_size)
                found += [scalapack.Scalapack(problem, library, grid, block) for block in scalapack.BLOCKS]
        return found, missing

    def show(self, rows: list[Row]) -> None:
        m, n, k = (rows[0][letter] for letter in "mnk")
        problem = Problem(m, n, k, np.dtype(self.dtype))
        repeats = max(row["repeats"] for row in rows)
        notes = ["ratio: to numpy's speed; words: array elements that the busiest rank receives"]
        if not self.algorithm or "scalapack" in self.algorithm:
            notes.insert(0, f"scalapack: {scalapack.library()}")
        title = f"{problem} on {self.job_size} ranks, {repeats} interleaved repeats"
        harness.show(title, _COLUMNS, rows, notes)

    def draw(self, rows: list[Row], path: Path) -> None:
        """Draw the speed of every competitor, best and median, with one panel for each size."""
        panels: dict[tuple[int, ...], list[Row]] = {}
        for row in rows:
            panels.setdefault((row["m"], row["n"], row["k"]), []).append(row)
        across = min(2, len(panels))
        down = -(-len(panels) // across)
        bars = max(map(len, panels.values()))
        size = 1 + 5 * across, 1 + down * (0.8 + 0.34 * bars)
        with harness.figure(path, down, across, size) as (figure, axes):
            for ax, (sizes, found) in zip(axes.flat, panels.items(), strict=False):
                _panel(ax, sizes, found)
            for ax in axes.flat[len(panels) :]:
                ax.remove()
            figure.suptitle(f"matrix product in {self.dtype}, {self.job_size} ranks: best (bar) and median (line)")

    def passed(self, rows: Sequence[Row]) -> bool:
        return any(row["error"] is None for row in rows)


def _problem(text: str, dtype: np.dtype[np.generic]) -> Problem:
    numbers = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    if len(numbers) not in (1, 3) or min(numbers) < 1:
        raise ConfigError(f"--size {text!r}: write M,N,K, for example 8192,512,512, or one number for a cube")
    m, n, k = numbers * 3 if len(numbers) == 1 else numbers
    return Problem(m, n, k, dtype)


def fastest(rows: Sequence[Row]) -> list[Row]:
    """Return the fastest row of each name, with ratios to NumPy: ScaLAPACK competes once for each block size."""
    best: dict[str, Row] = {}
    for row in rows:
        rival = best.setdefault(row["name"], row)
        if rival["error"] or (row["error"] is None and row["seconds"] < rival["seconds"]):
            best[row["name"]] = row
    return harness.with_ratios(list(best.values()), best.get("numpy"))


def place(row: Row) -> str:
    """Return where a competitor ran: its grid, its block size, its threads."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}" if row["name"] == "numpy" else ""
    grid = ",".join(f"{axis}={size}" for axis, size in row["grid"].items())
    return " ".join(word for word in (grid, row["note"], threads) if word) or "1 rank"


def _panel(ax: Any, size: Sequence[int], rows: Sequence[Row]) -> None:
    heights = [row["gflops"] or 0 for row in rows]
    colors = ["#b8bec6" if row["name"] in PEERS else "#4a7fb5" for row in rows]
    ax.barh(range(len(rows)), heights, 0.72, color=colors)
    top = max(heights) or 1
    for y, row in enumerate(rows):
        if row["error"] is not None:
            ax.text(0.01 * top, y, row["error"].partition(":")[0], va="center", size=8, color="#c0392b")
            continue
        ax.plot([row["median_gflops"]] * 2, [y - 0.36, y + 0.36], color="#22313f", lw=1.5)
        ratio = f"  {row['ratio']:.2f}x" if row["ratio"] and row["name"] != "numpy" else ""
        label = ax.text(row["gflops"] + 0.01 * top, y, f"{row['gflops']:.1f}{ratio}", va="center", size=8)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # over the line of NumPy
        if row["name"] == "numpy":
            ax.axvline(row["gflops"], color="#8a939c", ls="--", lw=0.8, zorder=0)
    ax.set_yticks(range(len(rows)), [f"{row['name']}  {place(row)}" for row in rows], size=8)
    ax.set(xlim=(0, 1.22 * top), xlabel="GFlop/s", title=" x ".join(f"{n:,}" for n in size))
    ax.invert_yaxis()
