"""ScaLAPACK's ``p?gemm`` by ctypes, on the MPI that this process has loaded already.

ScaLAPACK is made for one MPI library and names it: Debian's ``libscalapack-mpich`` asks for ``libmpich.so.12``, and
MPICH's wheel brings the same library as ``libmpi.so.12``. `environment` gives the ranks a folder in which the name that
is asked for links to the library that is there; the dynamic loader sees by the file itself that it has it already.
ScaLAPACK is loaded only where that holds, for two MPI libraries in one process would not know of each other.
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from mpi4py import MPI

from colossal_mpi.apps.bench.competitors import Competitor, Pieces
from colossal_mpi.apps.bench.operands import Piece, fill
from colossal_mpi.apps.bench.options import Problem
from colossal_mpi.errors import LaunchError, ShapeError

BLOCKS = (64, 128, 256)
_MPICH = "libmpich.so.12"
# The library, and the MPI that it asks for, by what the MPI in use calls itself. Intel MPI has the ABI of MPICH.
_FITTING = {
    "MPICH": ("scalapack-mpich", _MPICH),
    "Intel MPI": ("scalapack-mpich", _MPICH),
    "Open MPI": ("scalapack-openmpi", "libmpi.so.40"),
}
_LETTERS = {"float32": "s", "float64": "d", "complex64": "c", "complex128": "z"}
_INT_MAX = 2**31 - 1


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Yield the variables with which the ranks of a job find ScaLAPACK's MPI; they hold inside the context."""
    mine = _loaded("libmpi.so.12")
    if mine is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="colossal-mpi-") as folder:
        (Path(folder) / _MPICH).symlink_to(mine)
        before = os.environ.get("LD_LIBRARY_PATH")
        yield {"LD_LIBRARY_PATH": os.pathsep.join([folder, *([before] if before else [])])}


def _loaded(name: str) -> Path | None:
    """Return the file of that name which is mapped into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/"))
    return next((path for path in paths if path.name.startswith(name)), None)


class Library:
    """ScaLAPACK, loaded.

    Raises
    ------
    LaunchError
        There is none that fits the MPI in use.
    """

    def __init__(self) -> None:
        name, mpi = _FITTING.get(MPI.get_vendor()[0], ("scalapack", ""))
        self.file = find_library(name)
        if self.file is None:
            raise LaunchError(f"no lib{name} on this system (Debian: apt install lib{name}-dev libopenblas0-pthread)")
        try:
            ctypes.CDLL(mpi, os.RTLD_NOLOAD)
        except OSError:
            raise LaunchError(
                f"{self.file} wants {mpi}, which is not the MPI library in use; `colossal-mpi bench gemm --ranks N`, "
                "outside of mpiexec, gives it that name"
            ) from None
        before = threadpoolctl.threadpool_info()
        try:
            self.call = ctypes.CDLL(self.file)
        except OSError as problem:
            raise LaunchError(f"{self.file} cannot be loaded: {problem}") from None
        threadpoolctl.threadpool_limits(1, user_api="blas")  # of the BLAS that has come with it
        self.blas = _blas_of({pool["filepath"] for pool in before})
        self._contexts: dict[tuple[int, int], int] = {}

    def context(self, rows: int, columns: int) -> int:
        """Return the BLACS context of a grid, ranks in row-major order. Collective when first called for it."""
        if (rows, columns) not in self._contexts:
            context = ctypes.c_int()
            self.call.Cblacs_get(-1, 0, ctypes.byref(context))
            self.call.Cblacs_gridinit(ctypes.byref(context), b"Row", rows, columns)
            self._contexts[rows, columns] = context.value
        return self._contexts[rows, columns]


def _blas_of(before: set[str]) -> str:
    """Return the name of the BLAS that has been loaded since only `before` was, or that lies beside ``libblas``."""
    file = _loaded("libblas.so")
    for pool in threadpoolctl.threadpool_info():
        path = pool["filepath"]
        if pool["user_api"] == "blas" and (path not in before or (file and Path(path).parent == file.parent)):
            return " ".join(filter(None, (pool["internal_api"], pool["version"], pool.get("architecture"))))
    return f"{file or 'an unknown BLAS'} (a slow one? Debian: apt install libopenblas0-pthread)"


@functools.cache
def library() -> Library | str:
    """Return ScaLAPACK, or on every rank the reason why some rank has none."""
    try:
        mine: Library | str = Library()
    except LaunchError as problem:
        mine = str(problem)
    reasons = MPI.COMM_WORLD.allgather(mine if isinstance(mine, str) else None)
    return next((reason for reason in reasons if reason), mine)


class Scalapack(Competitor):
    """``p?gemm`` on block-cyclic matrices.

    Parameters
    ----------
    problem : Problem
    scalapack : Library
    grid : mapping of str to int
        ``row`` and ``col``.
    block : int
        Rows and columns of a block.
    """

    counted = False

    def __init__(self, problem: Problem, scalapack: Library, grid: Mapping[str, int], block: int) -> None:
        self._rows, self._columns = grid.get("row", 1), grid.get("col", 1)
        super().__init__("scalapack", problem, MPI.COMM_WORLD.size)
        self.grid = {axis: size for axis, size in grid.items() if size > 1}
        self.note, self.source = f"nb={block}", f"{scalapack.file} on {scalapack.blas}, the best of nb={BLOCKS}"
        self._block, self._scalapack = block, scalapack
        self._context = scalapack.context(self._rows, self._columns)
        self._matrices: tuple[_Cyclic, ...] = ()

    @property
    def group(self) -> MPI.Intracomm | None:
        """All ranks."""
        return MPI.COMM_WORLD

    @property
    def need(self) -> int:
        """The three matrices, and panels of a block's width for two of them."""
        p = self.problem
        local = sum(_most(x, self._block, self._rows) * _most(y, self._block, self._columns) for x, y in p.shapes)
        panels = self._block * (_most(p.m, self._block, self._rows) + _most(p.n, self._block, self._columns))
        return (local + panels) * p.dtype.itemsize

    def prepare(self) -> None:
        """Make this rank's blocks."""
        p = self.problem
        if max(p.m, p.n, p.k) > _INT_MAX:
            raise ShapeError(f"ScaLAPACK counts in 32 bits, and {p} has a size above {_INT_MAX:,}")
        self._matrices = tuple(self._matrix(shape, name) for shape, name in zip(p.shapes, "abc", strict=True))

    def _matrix(self, shape: tuple[int, int], name: str) -> _Cyclic:
        row, column = divmod(MPI.COMM_WORLD.rank, self._columns)
        rows = _mine(shape[0], self._block, self._rows, row)
        columns = _mine(shape[1], self._block, self._columns, column)
        local = len(rows), len(columns)
        # A name for each rank: which random matrix it is does not matter, and the blocks of a rank are one array.
        block = fill(((0, local[0]), (0, local[1])), local, self.problem.dtype, f"{name} {row} {column}", "F")
        lead = max(1, local[0])
        return _Cyclic(block, rows, columns, (1, self._context, *shape, self._block, self._block, 0, 0, lead))

    def run(self) -> None:
        """Call ``p?gemm`` with alpha 1 and beta 0."""
        p, one = self.problem, ctypes.byref(ctypes.c_int(1))
        a, b, c = ((m.block.ctypes.data_as(ctypes.c_void_p), one, one, m.descriptor) for m in self._matrices)
        alpha, beta = (np.array(x, p.dtype).ctypes.data_as(ctypes.c_void_p) for x in (1, 0))
        gemm = self._scalapack.call[f"p{_LETTERS[str(p.dtype)]}gemm_"]
        gemm(b"N", b"N", *(ctypes.byref(ctypes.c_int(n)) for n in (p.m, p.n, p.k)), alpha, *a, *b, beta, *c)

    def pieces(self) -> Pieces:
        """Return this rank's blocks."""
        a, b, c = (Piece(m.block, m.rows, m.columns) for m in self._matrices)
        return a, b, c

    def forget(self) -> None:
        """Let go of the matrices; the BLACS context stays."""
        self._matrices = ()


class _Cyclic:
    """A rank's part of a block-cyclic matrix: its block in Fortran order, its indices and ScaLAPACK's descriptor."""

    def __init__(self, block: np.ndarray, rows: np.ndarray, columns: np.ndarray, words: tuple[int, ...]) -> None:
        self.block, self.rows, self.columns = block, rows, columns
        self.descriptor: Any = (ctypes.c_int * len(words))(*words)


def _mine(n: int, block: int, parts: int, index: int) -> np.ndarray:
    """Return the indices of a dim that block-cyclic order gives to part `index`."""
    every = np.arange(n)
    return every[every // block % parts == index]


def _most(n: int, block: int, parts: int) -> int:
    """Return the indices that the first part has, which are the most."""
    whole, rest = divmod(n, block * parts)
    return whole * block + min(rest, block)
