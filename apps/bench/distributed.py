"""The products of ``colossal_mpi.linalg`` as competitors, each on the grid that suits it best.

``bench gemm`` makes one `Distributed` for each algorithm. linalg's price of a product chooses the grid and says how
much memory a rank needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import linalg
from colossal_mpi.apps.bench.product import Part, Parts, Problem, Product, fill
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout, box_shape, coords_of, index_of
from colossal_mpi.linalg import ALGORITHMS
from colossal_mpi.linalg.model import Price
from colossal_mpi.machine import TYPICAL
from colossal_mpi.platform import backend

_SUBSCRIPTS = "mk,kn->mn"


class Distributed(Product):
    """A product of ``colossal_mpi.linalg`` on the grid where it is fastest by linalg's price.

    Parameters
    ----------
    name : str
        A preset of `ALGORITHMS`, or ``auto``.
    problem : Problem
        The product.
    ranks : int
        The number of ranks of the job.
    """

    def __init__(self, name: str, problem: Problem, ranks: int) -> None:
        sizes = best_sizes(name, problem, ranks)
        members = math.prod(sizes.values())
        self.grid = {axis: size for axis, size in sizes.items() if size > 1}
        # On a grid without depth, 2.5d stores its operands as SUMMA does.
        self._preset = ALGORITHMS["2.5d" if name == "auto" else name]
        self._layouts = [_without(one, self.grid) for one in (self._preset.a, self._preset.b, self._preset.c)]
        self._grid = _grid(self.grid, members)
        group = None if self._grid is None else self._grid.comm(tuple(self._grid.axes))
        super().__init__(name, problem, members, group)
        self._arrays: tuple[DistArray, ...] = ()

    @property
    def need(self) -> int:
        # The first rank has the largest blocks.
        first = coords_of(0, self.grid)
        boxes = [lay.box(s, self.grid, first) for lay, s in zip(self._layouts, self.problem.shapes, strict=True)]
        workspace = _price(self.problem, self.grid, self._preset.axes, self._layouts).workspace
        return (sum(math.prod(box_shape(box)) for box in boxes) + workspace) * self.problem.dtype.itemsize

    def prepare(self) -> None:
        assert self._grid is not None
        operands = zip(self._layouts[:2], self.problem.shapes[:2], "ab", strict=True)
        self._arrays = tuple(self._operand(self._grid, *operand) for operand in operands)

    def _operand(self, grid: Grid, layout: Layout, shape: tuple[int, int], name: str) -> DistArray:
        block = fill(layout.box(shape, grid.axes, grid.coords), shape, self.problem.dtype, name)
        return DistArray(grid.to_block(block), shape, layout, grid)

    def work(self) -> None:
        a, b = self._arrays[:2]
        self._arrays = a, b  # free the result of the last run before the next one is made
        # A[M, K] . B[K, N] -> C[M, N], in the layouts of the preset
        c = linalg.matmul(a, b, self.name)
        backend.synchronize(c.local)
        self._arrays = a, b, c

    def parts(self) -> Parts:
        a, b, c = map(_owned, self._arrays)
        return a, b, c

    def forget(self) -> None:
        self._arrays = ()


def _owned(array: DistArray) -> Part:
    box = array.layout.owned(array.shape, array.grid.axes, array.grid.coords)
    if box is None:
        return Part(np.empty((0, 0), backend.numpy_dtype(array.dtype)), slice(0), slice(0))
    return Part(backend.to_host(array.local), *index_of(box))


def _without(layout: Layout, sizes: Mapping[str, int]) -> Layout:
    """Return a layout without the axes that a grid lacks."""
    return Layout(*[[axis for axis in dim if axis in sizes] for dim in layout.dims])


_grids: dict[tuple[tuple[str, int], ...], Grid | None] = {}


def _grid(sizes: Mapping[str, int], members: int) -> Grid | None:
    """Return the grid of the first ranks, None on the others. Each is made once: MPI has few communicators."""
    key = tuple(sizes.items()) or (("row", 1),)
    if key not in _grids:
        world = MPI.COMM_WORLD
        part: Any = world.Split(0 if world.rank < members else MPI.UNDEFINED, world.rank)
        _grids[key] = None if part == MPI.COMM_NULL else Grid(part, "auto", **dict(key))
    return _grids[key]


def best_sizes(name: str, problem: Problem, ranks: int) -> dict[str, int]:
    """Return the sizes of the axes of the grid for an algorithm.

    A preset gets all ranks, ``auto`` gets the grid that `linalg.best_grid` takes. A preset takes the grid whose
    busiest rank needs the least time by the model; grids on which a preset with fewer axes is the same product come
    last.

    Parameters
    ----------
    name : str
        A preset of `ALGORITHMS`, or ``auto``.
    problem : Problem
        The product.
    ranks : int
        The number of ranks of the job.
    """
    if name == "auto":
        return dict(linalg.best_grid(problem.m, problem.n, problem.k, ranks).sizes)
    axes, preset = list(ALGORITHMS[name].axes), ALGORITHMS[name]
    every = [dict(zip(axes, sizes, strict=True)) for sizes in _factors(ranks, len(axes))]
    own = [sizes for sizes in every if not _simpler(sizes, len(axes))] or every
    layouts, itemsize = [preset.a, preset.b, preset.c], problem.dtype.itemsize
    return min(own, key=lambda sizes: _price(problem, sizes, preset.axes, layouts).seconds(TYPICAL, itemsize))


def _simpler(sizes: Mapping[str, int], axes: int) -> bool:
    used = {axis for axis, size in sizes.items() if size > 1}
    return any(len(other.axes) < axes and used <= set(other.axes) for other in ALGORITHMS.values())


def _factors(ranks: int, parts: int) -> list[tuple[int, ...]]:
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    return [sizes for sizes in itertools.product(divisors, repeat=parts) if math.prod(sizes) == ranks]


def _price(problem: Problem, sizes: Mapping[str, int], axes: Mapping[str, str], layouts: list[Layout]) -> Price:
    extents = {"m": problem.m, "n": problem.n, "k": problem.k}
    used = {axis: letter for axis, letter in axes.items() if axis in sizes}
    a, b, c = layouts
    return linalg.price(_SUBSCRIPTS, extents, sizes, used, a, b, c)
