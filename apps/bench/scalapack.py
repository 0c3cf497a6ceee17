"""ScaLAPACK's ``p?gemm`` as a competitor, called by ctypes on the MPI library that this process has loaded already.

A ScaLAPACK is built for one MPI library and asks for it by name: Debian's ``libscalapack-mpich`` asks for
``libmpich.so.12``, and the wheel of MPICH has the same library as ``libmpi.so.12``. `environment` gives the ranks a
folder in which the first name links to the second one; the dynamic loader sees that it has loaded this file already.
ScaLAPACK is loaded only if the names fit, because two MPI libraries in one process would not know each other.
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

import numpy as np
import numpy.typing as npt
import threadpoolctl
from mpi4py import MPI

from colossal_mpi.apps.bench.product import Array, Indices, Part, Parts, Problem, Product, fill
from colossal_mpi.errors import LaunchError, ShapeError

BLOCKS = (64, 128, 256)
"""Block sizes of the block-cyclic layout; the fastest one counts."""
_MPICH = "libmpich.so.12"
# The name of ScaLAPACK and of the MPI library that it asks for, by the vendor of the MPI library in use. Intel MPI has
# the ABI of MPICH.
_FITTING = {
    "MPICH": ("scalapack-mpich", _MPICH),
    "Intel MPI": ("scalapack-mpich", _MPICH),
    "Open MPI": ("scalapack-openmpi", "libmpi.so.40"),
}
_LETTERS = {"float32": "s", "float64": "d", "complex64": "c", "complex128": "z"}
_INT_MAX = 2**31 - 1


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """Yield the variables with which the ranks of a job find the MPI library of ScaLAPACK. They hold in the context."""
    mpich = _loaded("libmpi.so.12")
    if mpich is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="colossal-mpi-") as folder:
        (Path(folder) / _MPICH).symlink_to(mpich)
        before = os.environ.get("LD_LIBRARY_PATH")
        yield {"LD_LIBRARY_PATH": os.pathsep.join([folder, *([before] if before else [])])}


def _loaded(name: str) -> Path | None:
    """Return the file that this process has mapped and whose name begins with `name`."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/"))
    return next((path for path in paths if path.name.startswith(name)), None)


class Library:
    """The loaded ScaLAPACK.

    Raises
    ------
    LaunchError
        If no ScaLAPACK fits the MPI library in use.
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
        threadpoolctl.threadpool_limits(1, user_api="blas")  # the BLAS that ScaLAPACK has loaded
        self.blas = _blas_of({pool["filepath"] for pool in before})
        self._contexts: dict[tuple[int, int], int] = {}

    def __str__(self) -> str:
        return f"{self.file} on {self.blas}, the best of nb={BLOCKS}"

    def context(self, rows: int, columns: int) -> int:
        """Return the BLACS context of a grid with ranks in row-major order. Collective when a grid is new."""
        if (rows, columns) not in self._contexts:
            context = ctypes.c_int()
            self.call.Cblacs_get(-1, 0, ctypes.byref(context))
            self.call.Cblacs_gridinit(ctypes.byref(context), b"Row", rows, columns)
            self._contexts[rows, columns] = context.value
        return self._contexts[rows, columns]


def _blas_of(before: set[str]) -> str:
    """Return the name of the BLAS that is not among the files `before`, or that lies beside ``libblas``."""
    file = _loaded("libblas.so")
    for pool in threadpoolctl.threadpool_info():
        path = pool["filepath"]
        if pool["user_api"] == "blas" and (path not in before or (file and Path(path).parent == file.parent)):
            return " ".join(filter(None, (pool["internal_api"], pool["version"], pool.get("architecture"))))
    return f"{file or 'an unknown BLAS'} (a slow one? Debian: apt install libopenblas0-pthread)"


@functools.cache
def library() -> Library | str:
    """Return ScaLAPACK; on every rank the reason instead if some rank has none. Collective over all ranks."""
    try:
        found: Library | str = Library()
    except LaunchError as problem:
        found = str(problem)
    reasons = MPI.COMM_WORLD.allgather(found if isinstance(found, str) else None)
    return next((reason for reason in reasons if reason), found)


class Scalapack(Product):
    """``p?gemm`` on block-cyclic matrices.

    Parameters
    ----------
    problem : Problem
        The product.
    scalapack : Library
        The loaded library.
    grid : mapping of str to int
        Sizes of ``row`` and ``col``.
    block : int
        Rows and columns of a block.
    """

    recorded = False

    def __init__(self, problem: Problem, scalapack: Library, grid: Mapping[str, int], block: int) -> None:
        super().__init__("scalapack", problem, MPI.COMM_WORLD.size, MPI.COMM_WORLD)
        self._rows, self._columns = grid.get("row", 1), grid.get("col", 1)
        self.grid = {axis: size for axis, size in grid.items() if size > 1}
        self.note = f"nb={block}"
        self._block, self._scalapack = block, scalapack
        self._context = scalapack.context(self._rows, self._columns)
        self._matrices: tuple[_BlockCyclic, ...] = ()

    @property
    def need(self) -> int:
        # The three matrices, and panels of a block's width for two of them.
        p = self.problem
        local = sum(_most(x, self._block, self._rows) * _most(y, self._block, self._columns) for x, y in p.shapes)
        panels = self._block * (_most(p.m, self._block, self._rows) + _most(p.n, self._block, self._columns))
        return (local + panels) * p.dtype.itemsize

    def prepare(self) -> None:
        p = self.problem
        if max(p.m, p.n, p.k) > _INT_MAX:
            raise ShapeError(f"ScaLAPACK counts in 32 bits, and {p} has a size above {_INT_MAX:,}")
        self._matrices = tuple(self._matrix(shape, name) for shape, name in zip(p.shapes, "abc", strict=True))

    def _matrix(self, shape: tuple[int, int], name: str) -> _BlockCyclic:
        row, column = divmod(MPI.COMM_WORLD.rank, self._columns)
        rows = _indices(shape[0], self._block, self._rows, row)
        columns = _indices(shape[1], self._block, self._columns, column)
        local = len(rows), len(columns)
        # Each rank draws its own random matrix: all blocks of a rank are one array.
        block = fill(((0, local[0]), (0, local[1])), local, self.problem.dtype, f"{name} {row} {column}", "F")
        lead = max(1, local[0])
        return _BlockCyclic(block, rows, columns, (1, self._context, *shape, self._block, self._block, 0, 0, lead))

    def work(self) -> None:
        p, one = self.problem, ctypes.byref(ctypes.c_int(1))
        a, b, c = ((m.block.ctypes.data_as(ctypes.c_void_p), one, one, m.descriptor) for m in self._matrices)
        alpha, beta = (np.array(x, p.dtype).ctypes.data_as(ctypes.c_void_p) for x in (1, 0))
        gemm = self._scalapack.call[f"p{_LETTERS[str(p.dtype)]}gemm_"]
        # A[M_row, K_col] . B[K_row, N_col] -> C[M_row, N_col], all block-cyclic
        gemm(b"N", b"N", *(ctypes.byref(ctypes.c_int(n)) for n in (p.m, p.n, p.k)), alpha, *a, *b, beta, *c)

    def parts(self) -> Parts:
        a, b, c = (Part(m.block, m.rows, m.columns) for m in self._matrices)
        return a, b, c

    def forget(self) -> None:
        self._matrices = ()


class _BlockCyclic:
    """A rank's part of a block-cyclic matrix: its block in Fortran order, its indices and ScaLAPACK's descriptor."""

    def __init__(self, block: Array, rows: Indices, columns: Indices, words: tuple[int, ...]) -> None:
        self.block, self.rows, self.columns = block, rows, columns
        self.descriptor: ctypes.Array[ctypes.c_int] = (ctypes.c_int * len(words))(*words)


def _indices(n: int, block: int, parts: int, index: int) -> npt.NDArray[np.intp]:
    """Return the indices of a dim of length `n` that the block-cyclic layout gives to part `index`."""
    every = np.arange(n)
    found: npt.NDArray[np.intp] = every[every // block % parts == index]
    return found


def _most(n: int, block: int, parts: int) -> int:
    """Return the number of indices of the first part, which has the most."""
    whole, rest = divmod(n, block * parts)
    return whole * block + min(rest, block)
