"""The named algorithms: presets of `contract`'s map, and the storage in which each moves the fewest words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import GridError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.model.auto import fastest
from colossal_mpi.linalg.verify import Check

GEMM = "mk,kn->mn"


@dataclass(frozen=True)
class Algorithm:
    """A map of grid axes to the edges of the product, and layouts that store each matrix once."""

    axes: Mapping[str, str]
    a: Layout
    b: Layout
    c: Layout
    stream: str = "k"
    """The letter of its panels, if it is done in panels."""

    def fits(self, grid: Grid) -> bool:
        """Say whether every axis of the grid larger than 1 has a place in this algorithm."""
        return all(axis in self.axes for axis, size in grid.axes.items() if size > 1)

    def on(self, grid: Grid) -> Algorithm:
        """Return the algorithm without the axes that the grid lacks: an absent axis has size 1."""

        def present(layout: Layout) -> Layout:
            return Layout(*[[axis for axis in dim if axis in grid.axes] for dim in layout.dims])

        axes = {axis: letter for axis, letter in self.axes.items() if axis in grid.axes}
        return Algorithm(axes, present(self.a), present(self.b), present(self.c), self.stream)


ALGORITHMS: dict[str, Algorithm] = {
    "1d-column": Algorithm({"col": "n"}, Layout("col", None), Layout(None, "col"), Layout(None, "col")),
    "1d-row": Algorithm({"col": "k"}, Layout(None, "col"), Layout("col", None), Layout("col", None), "m"),
    # van de Geijn & Watts 1997; C stationary
    "summa": Algorithm({"row": "m", "col": "n"}, Layout("row", "col"), Layout("row", "col"), Layout("row", "col")),
    # A or B stationary: what moves is the two smaller matrices
    "summa-a": Algorithm(
        {"row": "m", "col": "k"}, Layout("row", "col"), Layout("col", "row"), Layout("row", "col"), "n"
    ),
    "summa-b": Algorithm(
        {"row": "k", "col": "n"}, Layout("col", "row"), Layout("row", "col"), Layout("row", "col"), "m"
    ),
    # Solomonik & Demmel 2011, depth layer l owning the l-th slice of k: no operand is replicated
    "2.5d": Algorithm(
        {"row": "m", "col": "n", "depth": "k"},
        Layout("row", ("depth", "col")),
        Layout(("depth", "row"), "col"),
        Layout(("row", "depth"), "col"),
    ),
    # Agarwal et al. 1995
    "3d": Algorithm(
        {"row": "m", "col": "n", "depth": "k"},
        Layout(("row", "col"), "depth"),
        Layout(("depth", "row"), "col"),
        Layout(("row", "depth"), "col"),
    ),
}
"""The presets by name. `2.5d` and `3d` are one map and differ in how A is stored."""


def preset(algorithm: str, grid: Grid) -> Algorithm:
    """Return a preset for a grid.

    Raises
    ------
    GridError
        If there is no such preset or the grid has an axis that it does not use.
    """
    if algorithm not in ALGORITHMS:
        raise GridError(f"matmul: no algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    choice = ALGORITHMS[algorithm]
    if not choice.fits(grid):
        fitting = [name for name, other in ALGORITHMS.items() if other.fits(grid)]
        raise GridError(
            f"matmul: {algorithm!r} uses the axes {', '.join(choice.axes)} and not all of {grid}; "
            f"{'on this grid use ' + ', '.join(fitting) if fitting else 'or call contract with a map'}"
        )
    return choice.on(grid)


def matmul(
    a: DistArray,
    b: DistArray,
    algorithm: str | None = None,
    out: Layout | DistArray | None = None,
    *,
    alpha: complex = 1,
    beta: complex = 0,
    conj: str = "",
    panel: int | None = None,
    verify: bool = False,
) -> DistArray:
    """Return the matrix product ``alpha op(a) op(b) + beta out``.

    Parameters
    ----------
    a : DistArray, ``[m, k]``
    b : DistArray, ``[k, n]``
        In any layout on the same grid; in the layouts of `preset` each word moves once.
    algorithm : str, optional
        ``1d-column``, ``1d-row``, ``summa``, ``summa-a``, ``summa-b``, ``2.5d`` or ``3d``; by default the first of them
        that uses all axes of the grid. ``auto`` takes the map that is modelled to be fastest from where the operands
        lie, see `options`.
    out : Layout or DistArray, optional
        Layout of the result, or an array to write it into; by default the layout of the preset, or of the map that
        ``auto`` takes.
    alpha, beta, conj
        As in `contract`.
    panel : int, optional
        Do the product in panels of at most so many indices of the letter that the algorithm streams: k, but n in
        ``summa-a`` and m in ``summa-b`` and ``1d-row``. By default whole.
    verify : bool
        Check the result against thin products with random vectors, see `verify`; it costs
        ``10 (1/m + 1/n + 1/k)`` of the product's flop, and one more thin product if beta is not 0.

    **Communication:** summed over ranks ``mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)`` words if `a` and `b` are stored as
    the preset has them, and the moves to it if not. **Adjoint:** `contract` with the same map.

    Raises
    ------
    ShapeError, GridError
        If the arrays are no matrices that fit, or the grid has an axis that the algorithm does not use.
    """
    if a.ndim != 2 or b.ndim != 2:
        raise ShapeError(f"matmul of shapes {a.shape} and {b.shape}: both must have 2 dims; contract takes any number")
    if algorithm == "auto":
        best = fastest("mk,kn->mn", a, b, out.layout if isinstance(out, DistArray) else out)
        axes, result, stream = best.axes, best.out, "k"
    else:
        choice = preset(algorithm or _default(a.grid), a.grid)
        axes, result, stream = choice.axes, choice.c, choice.stream
    check = Check(GEMM, a, b, alpha, beta, out, conj) if verify else None
    in_panels: dict[str, Any] = {} if panel is None else {"stream": stream, "panel": panel}
    c = contract(GEMM, a, b, axes, result if out is None else out, alpha=alpha, beta=beta, conj=conj, **in_panels)
    if check:
        check.passes(c)
    return c


def _default(grid: Grid) -> str:
    return next((name for name, choice in ALGORITHMS.items() if choice.fits(grid)), "summa")
