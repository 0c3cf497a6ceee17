"""Matrix products as competitors: random operands of any dtype, a check that gathers nothing, and NumPy as the base.

`Product` is the competitor of ``bench gemm``; `distributed` and `scalapack` derive from it. Each rank fills its own
block of the same random matrices, and a residual against random vectors checks the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from colossal_mpi import ledger, random
from colossal_mpi.apps.bench import node, timing
from colossal_mpi.apps.bench.harness import Competitor, Row
from colossal_mpi.layout import Box, box_shape

Indices: TypeAlias = "slice | npt.NDArray[np.intp]"
Array: TypeAlias = "npt.NDArray[Any]"
_CHUNK = 1 << 18  # elements to make at a time; the generator's temporaries are several times as large
_VECTORS = 10  # random vectors of the check
TOLERANCE = 20.0
"""Greatest residual that passes, in units of eps; products of zero-mean numbers by plain BLAS come to 3 to 11."""


@dataclass(frozen=True)
class Problem:
    """The product of an m x k matrix and a k x n matrix."""

    m: int
    n: int
    k: int
    dtype: np.dtype[Any]

    @property
    def flop(self) -> int:
        """Floating-point operations: 2mnk, and four times as many for complex numbers."""
        return (8 if self.dtype.kind == "c" else 2) * self.m * self.n * self.k

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The global shapes of A, B and C."""
        return (self.m, self.k), (self.k, self.n), (self.m, self.n)

    def __str__(self) -> str:
        return f"{self.m:,} x {self.n:,} x {self.k:,} {self.dtype}"


def fill(box: Box, shape: tuple[int, int], dtype: np.dtype[Any], name: str, order: Literal["C", "F"] = "C") -> Array:
    """Return a block of the global random matrix of this name, with numbers in [-1/2, 1/2).

    Parameters
    ----------
    box : Box
        Rows and columns of the block.
    shape : (int, int)
        Global shape of the matrix.
    dtype : numpy.dtype
        Real or complex.
    name : str
        Name of the matrix: matrices of other names have other numbers.
    order : {"C", "F"}
        Memory order of the block.
    """
    out = np.empty(box_shape(box), dtype, order)
    (start, stop), columns = box
    step = max(1, _CHUNK // max(1, columns[1] - columns[0]))
    for low in range(start, stop, step):
        part = ((low, min(low + step, stop)), columns)
        values = out[low - start : low - start + step]
        values[...] = random.uniform_block(part, shape, 0, name) - 0.5
        if dtype.kind == "c":
            values += 1j * (random.uniform_block(part, shape, 0, f"{name} imaginary") - 0.5)
    return out


@dataclass(frozen=True)
class Part:
    """The elements of a matrix that one rank owns; each element has one owner."""

    block: Array
    rows: Indices
    """Global indices of the rows."""
    columns: Indices
    """Global indices of the columns."""


Parts: TypeAlias = tuple[Part, Part, Part]
"""A rank's parts of A, B and C."""


def residual(parts: Parts | None, problem: Problem) -> float:
    """Return ``||CX - A(BX)|| / ||A(BX)||`` in the Frobenius norm, in units of eps, for random X of +1 and -1.

    Parameters
    ----------
    parts : (Part, Part, Part) or None
        This rank's parts of A, B and C; None if it owns nothing.
    problem : Problem
        The product.

    Returns
    -------
    float
        The residual, the same on all ranks up to rounding.

    Notes
    -----
    **Communication:** three allreduces of thin matrices over all ranks, by MPI itself: the check shares no code with
    the product that it checks. A rank receives ``10 (k + 2m)`` words or a little more.

    References
    ----------
    R. Freivalds, Probabilistic machines can use less running time, IFIP Congress 1977.
    """
    m, n, k, dtype = problem.m, problem.n, problem.k, problem.dtype
    a, b, c = parts or (None, None, None)
    signs = random.uniform_block(((0, n), (0, _VECTORS)), (n, _VECTORS), 0, "check") < 0.5
    x = np.where(signs, -1, 1).astype(dtype)
    # A[M, K] . (B[K, N] . X[N, v]) -> Y[M, v], every rank with the blocks that it owns
    y = _times(a, m, _times(b, k, x))
    # C[M, N] . X[N, v] - Y[M, v]
    difference, size = (float(np.linalg.norm(z)) for z in (_times(c, m, x) - y, y))
    eps = float(np.finfo(dtype).eps)
    return difference / (size * eps) if size else difference / eps


def _times(part: Part | None, rows: int, x: Array) -> Array:
    """Return the product of a matrix with this number of rows and `x`, on every rank."""
    y = np.zeros((rows, x.shape[1]), x.dtype)
    if part is not None:
        y[part.rows] += part.block @ x[part.columns]
    # Y[M, v] {U_ranks} -> Y[M, v]: allreduce over all ranks
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, y)
    return y


class Product(Competitor, ABC):
    """One way to do a product, with its operands in the layouts that it needs.

    Parameters
    ----------
    name : str
        Name in the table.
    problem : Problem
        The product.
    members : int
        The number of ranks that work, the first ones of the job.
    group : MPI.Intracomm or None
        Their communicator; None on the other ranks.
    """

    grid: Mapping[str, int]
    """Sizes of the axes larger than 1."""
    note = ""
    """A further remark in the table."""
    recorded = True
    """True if the ledger records the words that it moves."""

    def __init__(self, name: str, problem: Problem, members: int, group: MPI.Intracomm | None) -> None:
        super().__init__(name, group, members)
        self.problem = problem
        self.words: int | None = None
        self.residual: float | None = None

    @abstractmethod
    def parts(self) -> Parts:
        """Return the parts of A, B and C that one of its ranks owns after a run."""

    def check(self) -> str | None:
        with ledger.record() as moved:
            self.run()
        self.words = max(MPI.COMM_WORLD.allgather(moved.words)) if self.recorded else None
        found: float = MPI.COMM_WORLD.bcast(residual(None if self.group is None else self.parts(), self.problem))
        self.residual = found
        if found <= TOLERANCE:
            return None
        return f"wrong: ||CX - A(BX)|| is {found:.3g} eps ||A(BX)||, and {TOLERANCE:g} eps are allowed"

    def row(self) -> Row:
        """Return the result as a row."""
        return {
            **description(self.name, self.problem),
            "threads": self.threads,
            "grid": dict(self.grid),
            "note": self.note,
            "words": self.words,
            "residual": self.residual,
            **self.figures(gflops=self.problem.flop / 1e9),
        }


def description(name: str, problem: Problem) -> Row:
    """Return the part of a row that says what ran."""
    sizes = {"m": problem.m, "n": problem.n, "k": problem.k}
    return {"name": name, **sizes, "dtype": str(problem.dtype), "ranks": MPI.COMM_WORLD.size}


class NumPy(Product):
    """``numpy.matmul`` on rank 0, with as many threads as the ranks have cores; the other ranks sleep."""

    recorded = False

    def __init__(self, problem: Problem) -> None:
        super().__init__("numpy", problem, 1, MPI.COMM_SELF if MPI.COMM_WORLD.rank == 0 else None)
        self._cores, self.grid = node.cores(), {}
        self.threads = min(MPI.COMM_WORLD.size, len(self._cores))
        self._arrays: tuple[Array, ...] = ()

    @property
    def need(self) -> int:
        return sum(map(math.prod, self.problem.shapes)) * self.problem.dtype.itemsize

    def prepare(self) -> None:
        # The memory of C is made here, too: NumPy allocates nothing in a run.
        whole = zip(self.problem.shapes, "abc", strict=True)
        self._arrays = tuple(fill(((0, m), (0, n)), (m, n), self.problem.dtype, name) for (m, n), name in whole)

    def work(self) -> None:
        a, b, c = self._arrays
        # A[M, K] . B[K, N] -> C[M, N]
        np.matmul(a, b, out=c)

    def parts(self) -> Parts:
        a, b, c = (Part(array, slice(None), slice(None)) for array in self._arrays)
        return a, b, c

    def forget(self) -> None:
        self._arrays = ()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use all cores of the node in a run, and wait afterwards until the threads of BLAS sleep."""
        if self.group is None:
            yield
            return
        with timing.blas_threads(self.threads, self._cores):
            yield
        timing.cool_down()
