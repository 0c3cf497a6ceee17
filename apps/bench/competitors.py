"""What takes part in a benchmark, and the yardstick: NumPy in one process."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
from mpi4py import MPI

from colossal_mpi.apps.bench import timing
from colossal_mpi.apps.bench.operands import Piece, fill
from colossal_mpi.apps.bench.options import Problem

Pieces = tuple[Piece, Piece, Piece]


class Competitor(ABC):
    """One way to do a product, with its operands where it wants them.

    Parameters
    ----------
    name : str
    problem : Problem
    members : int
        The first ranks of the job, that take part.
    """

    grid: Mapping[str, int]
    """Sizes of the axes larger than 1."""
    note = ""
    """What else the table says of it."""
    source = ""
    """The library that it comes from, if that is not ours."""
    threads = 1
    """Of BLAS, on each of its ranks."""
    counted = True
    """Whether the ledger sees what it moves."""

    def __init__(self, name: str, problem: Problem, members: int) -> None:
        self.name, self.problem, self.members = name, problem, members
        self.inside = MPI.COMM_WORLD.rank < members

    @property
    @abstractmethod
    def group(self) -> MPI.Intracomm | None:
        """The communicator of the members; None on the other ranks."""

    @property
    @abstractmethod
    def need(self) -> int:
        """The bytes that a member holds at most: operands, result and workspace."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the operands of a member. Nothing is communicated."""

    @abstractmethod
    def run(self) -> None:
        """Do the product on a member, and keep the result."""

    @abstractmethod
    def pieces(self) -> Pieces:
        """Return what a member holds of A, B and C after a run."""

    @abstractmethod
    def forget(self) -> None:
        """Let go of operands and result."""

    def alone(self) -> AbstractContextManager[None]:
        """Return what has to hold during a run."""
        return nullcontext()


class OneProcess(Competitor):
    """NumPy on rank 0, with as many threads as the ranks have cores; the other ranks sleep."""

    counted = False

    def __init__(self, problem: Problem) -> None:
        super().__init__("numpy", problem, 1)
        node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self._cores, self.grid = timing.cores(node), {}
        node.Free()
        self.threads = min(MPI.COMM_WORLD.size, len(self._cores))
        self._arrays: tuple[np.ndarray, ...] = ()

    @property
    def group(self) -> MPI.Intracomm | None:
        """Rank 0."""
        return MPI.COMM_SELF if self.inside else None

    @property
    def need(self) -> int:
        """The three matrices."""
        return sum(map(math.prod, self.problem.shapes)) * self.problem.dtype.itemsize

    def prepare(self) -> None:
        """Make A, B and the memory of C: NumPy then allocates nothing in a run."""
        whole = zip(self.problem.shapes, "abc", strict=True)
        self._arrays = tuple(fill(((0, m), (0, n)), (m, n), self.problem.dtype, name) for (m, n), name in whole)

    def run(self) -> None:
        """Call ``numpy.matmul``."""
        a, b, c = self._arrays
        np.matmul(a, b, out=c)

    def pieces(self) -> Pieces:
        """Return the whole of all three."""
        a, b, c = (Piece(array, slice(None), slice(None)) for array in self._arrays)
        return a, b, c

    def forget(self) -> None:
        """Let go of the arrays."""
        self._arrays = ()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use all cores of the node in a run, and wait afterwards until the threads sleep."""
        if not self.inside:
            yield
            return
        with timing.blas_threads(self.threads, self._cores):
            yield
        timing.cool_down()
