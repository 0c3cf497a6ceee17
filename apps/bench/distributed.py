"""The products of `colossal_mpi.linalg` as competitors, each on the grid that suits it best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import linalg
from colossal_mpi.apps.bench.competitors import Competitor, Pieces
from colossal_mpi.apps.bench.operands import Piece, fill
from colossal_mpi.apps.bench.options import Problem
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout, box_shape, coords_of, index_of
from colossal_mpi.linalg import ALGORITHMS
from colossal_mpi.linalg.model.price import Cost
from colossal_mpi.platform import backend

_SUBSCRIPTS = "mk,kn->mn"


class Distributed(Competitor):
    """A product of `colossal_mpi.linalg` on the grid where it moves the fewest words.

    Parameters
    ----------
    name : str
        Of a preset of `ALGORITHMS`, or ``auto``.
    problem : Problem
    ranks : int
        That there are.
    """

    def __init__(self, name: str, problem: Problem, ranks: int) -> None:
        sizes = best_sizes(name, problem, ranks)
        super().__init__(name, problem, math.prod(sizes.values()))
        self.grid = {axis: size for axis, size in sizes.items() if size > 1}
        # On a grid without depth, the storage of 2.5d is that of SUMMA.
        preset = ALGORITHMS["2.5d" if name == "auto" else name]
        self._layouts = [_without(layout, self.grid) for layout in (preset.a, preset.b, preset.c)]
        self._grid = _grid(self.grid, self.members)
        self._arrays: tuple[DistArray, ...] = ()

    @property
    def group(self) -> MPI.Intracomm | None:
        """The communicator of the grid."""
        return None if self._grid is None else self._grid.comm(tuple(self._grid.axes))

    @property
    def need(self) -> int:
        """The blocks of the first rank, which are the largest, and the workspace that `price` predicts."""
        first = coords_of(0, self.grid)
        boxes = [lay.box(s, self.grid, first) for lay, s in zip(self._layouts, self.problem.shapes, strict=True)]
        axes = ALGORITHMS["2.5d" if self.name == "auto" else self.name].axes
        workspace = _price(self.problem, self.grid, axes, self._layouts).workspace
        return (sum(math.prod(box_shape(box)) for box in boxes) + workspace) * self.problem.dtype.itemsize

    def prepare(self) -> None:
        """Make this rank's blocks of A and B."""
        if self._grid is not None:
            shapes = self.problem.shapes[:2]
            made = zip(self._layouts[:2], shapes, "ab", strict=True)
            self._arrays = tuple(self._made(layout, shape, name) for layout, shape, name in made)

    def _made(self, layout: Layout, shape: tuple[int, int], name: str) -> DistArray:
        assert self._grid is not None
        block = fill(layout.box(shape, self._grid.axes, self._grid.coords), shape, self.problem.dtype, name)  # type: ignore[arg-type]
        return DistArray(self._grid.own(block), shape, layout, self._grid)

    def run(self) -> None:
        """Call `linalg.matmul`."""
        a, b = self._arrays[:2]
        self._arrays = a, b  # the result of the last run goes before the next is made
        c = linalg.matmul(a, b, self.name)
        backend.synchronize(c.local)
        self._arrays = a, b, c

    def pieces(self) -> Pieces:
        """Return what this rank owns."""
        a, b, c = map(_owned, self._arrays)
        return a, b, c

    def forget(self) -> None:
        """Let go of the arrays; the grid stays."""
        self._arrays = ()


def _owned(array: DistArray) -> Piece:
    box = array.layout.owned(array.shape, array.grid.axes, array.grid.coords)
    if box is None:
        return Piece(np.empty((0, 0), backend.numpy_dtype(array.dtype)), slice(0), slice(0))
    return Piece(backend.to_host(array.local), *index_of(box))


def _without(layout: Layout, sizes: Mapping[str, int]) -> Layout:
    return Layout(*[[axis for axis in dim if axis in sizes] for dim in layout.dims])


_grids: dict[tuple[tuple[str, int], ...], Grid | None] = {}


def _grid(sizes: Mapping[str, int], members: int) -> Grid | None:
    """Return the grid of the first ranks, None on the others; each grid is made once, since communicators are few."""
    key = tuple(sizes.items()) or (("row", 1),)
    if key not in _grids:
        world = MPI.COMM_WORLD
        part: Any = world.Split(0 if world.rank < members else MPI.UNDEFINED, world.rank)
        axes: dict[str, Any] = dict(key)
        _grids[key] = None if part == MPI.COMM_NULL else Grid(part, **axes)
    return _grids[key]


def best_sizes(name: str, problem: Problem, ranks: int) -> dict[str, int]:
    """Return the grid of an algorithm: of all ranks for a preset, the one that `best_grid` takes for ``auto``.

    Of the grids of a preset those come first on which no preset with fewer axes is the same product, and of those the
    one on which the modelled time of its busiest rank is least.
    """
    if name == "auto":
        return dict(linalg.best_grid(problem.m, problem.n, problem.k, ranks).sizes)
    axes, preset = list(ALGORITHMS[name].axes), ALGORITHMS[name]
    every = [dict(zip(axes, sizes, strict=True)) for sizes in _factors(ranks, len(axes))]
    own = [sizes for sizes in every if not _simpler(sizes, len(axes))] or every
    machine, layouts = linalg.Machine(), [preset.a, preset.b, preset.c]
    return min(own, key=lambda sizes: machine.seconds(_price(problem, sizes, preset.axes, layouts)))


def _simpler(sizes: Mapping[str, int], axes: int) -> bool:
    used = {axis for axis, size in sizes.items() if size > 1}
    return any(len(other.axes) < axes and used <= set(other.axes) for other in ALGORITHMS.values())


def _factors(ranks: int, parts: int) -> list[tuple[int, ...]]:
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    return [sizes for sizes in itertools.product(divisors, repeat=parts) if math.prod(sizes) == ranks]


def _price(problem: Problem, sizes: Mapping[str, int], axes: Mapping[str, str], layouts: list[Layout]) -> Cost:
    extents = {"m": problem.m, "n": problem.n, "k": problem.k}
    used = {axis: letter for axis, letter in axes.items() if axis in sizes}
    a, b, c = layouts
    return linalg.price(_SUBSCRIPTS, extents, sizes, used, a, b, c)
