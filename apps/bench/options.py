"""What a benchmark is asked to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colossal_mpi.apps.files import check_writable
from colossal_mpi.errors import ConfigError
from colossal_mpi.linalg import ALGORITHMS

DTYPES = ("float64", "float32", "complex64", "complex128")
PEERS = ("numpy", "scalapack")
NAMES = (*PEERS, *ALGORITHMS, "auto")


@dataclass(frozen=True)
class Problem:
    """The product of an m x k and a k x n matrix."""

    m: int
    n: int
    k: int
    dtype: np.dtype

    @property
    def flop(self) -> int:
        """Floating-point operations: 2mnk, four times as many in complex numbers."""
        return (8 if self.dtype.kind == "c" else 2) * self.m * self.n * self.k

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of A, B and C."""
        return (self.m, self.k), (self.k, self.n), (self.m, self.n)

    def __str__(self) -> str:
        return f"{self.m:,} x {self.n:,} x {self.k:,} {self.dtype}"


@dataclass(frozen=True)
class Options:
    """A checked command line.

    Parameters
    ----------
    problems : tuple of Problem
    ranks : int
    names : tuple of str
        Of the competitors, of `NAMES`.
    required : bool
        Whether the user has named them, so that one that is missing is reported as such.
    repeat : int, optional
        Rounds of all competitors; by default as many as make the times reliable.
    json, plot : Path, optional
        Files to write.
    """

    problems: tuple[Problem, ...]
    ranks: int
    names: tuple[str, ...] = NAMES
    required: bool = False
    repeat: int | None = None
    json: Path | None = None
    plot: Path | None = None

    def arguments(self) -> list[str]:
        """Return the command line of the ranks."""
        return list(self._arguments())

    def _arguments(self) -> Iterator[str]:
        for problem in self.problems:
            yield from ("--size", f"{problem.m},{problem.n},{problem.k}")
        yield from ("--dtype", str(self.problems[0].dtype))
        for name in self.names if self.required else ():
            yield from ("--algorithm", name)
        for option, value in (("--repeat", self.repeat), ("--json", self.json), ("--plot", self.plot)):
            if value is not None:
                yield from (option, str(value))


def checked(
    sizes: Sequence[str],
    ranks: int | None,
    dtype: str,
    algorithms: Sequence[str],
    repeat: int | None,
    json: Path | None,
    plot: Path | None,
    *,
    world: int,
) -> Options:
    """Return the options of a command line given to a job of `world` ranks.

    Raises
    ------
    ConfigError
        If one of them cannot be.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    unknown = [name for name in algorithms if name not in NAMES]
    if unknown:
        raise ConfigError(f"--algorithm {', '.join(unknown)}: use one of {', '.join(NAMES)}")
    if repeat is not None and repeat < 1:
        raise ConfigError(f"--repeat {repeat}: at least one round has to run, for example --repeat 5")
    for path in (json, plot):
        check_writable(path)
    return Options(
        tuple(_problem(size, np.dtype(dtype)) for size in sizes),
        _ranks(ranks, world),
        tuple(dict.fromkeys(algorithms)) or NAMES,
        bool(algorithms),
        repeat,
        json,
        plot,
    )


def _problem(text: str, dtype: np.dtype) -> Problem:
    numbers = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    if len(numbers) not in (1, 3) or min(numbers) < 1:
        raise ConfigError(f"--size {text!r}: write M,N,K, for example 8192,512,512, or one number for a cube")
    m, n, k = numbers * 3 if len(numbers) == 1 else numbers
    return Problem(m, n, k, dtype)


def _ranks(ranks: int | None, world: int) -> int:
    if world == 1:
        return _DEFAULT_RANKS if ranks is None else _positive(ranks)
    if ranks not in (None, world):
        raise ConfigError(f"--ranks {ranks} in a job of {world} ranks: leave it out, or run this outside of mpiexec")
    return world


_DEFAULT_RANKS = 4


def _positive(ranks: int) -> int:
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: a job has at least one rank, for example --ranks 4")
    return ranks
