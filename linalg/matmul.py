"""`matmul` and the named algorithms: presets of the map of `contract`, with the layouts that move the fewest words.

``A @ B`` and user programs call `matmul`. The module holds no algorithm: it looks up a preset, or asks ``linalg.model``
for the fastest map, and calls `contract`.

The preset ``2.5d`` is the algorithm of Solomonik and Demmel, a product of two matrices. The tensor mode ``2.5d`` of
``layers.Parallelism`` is Tesseract (Wang et al.), a way to cut the weights of a network. They share nothing but the
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import GridError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.model import fastest
from colossal_mpi.linalg.verify import Check

GEMM = "mk,kn->mn"


@dataclass(frozen=True)
class Algorithm:
    """A named algorithm for ``C[m, n] = A[m, k] B[k, n]``: a map, and layouts that store each matrix once.

    Parameters
    ----------
    axes : mapping of str to str
        Grid axis to letter: m, n or k.
    a, b, c : Layout
        The layouts of the three matrices in which every word moves once.
    stream : str
        The letter of the panels, if the product is done in panels.
    """

    axes: Mapping[str, str]
    a: Layout
    b: Layout
    c: Layout
    stream: str = "k"

    def fits(self, grid: Grid) -> bool:
        """Return whether the algorithm uses every axis of a grid.

        Parameters
        ----------
        grid : Grid
            The grid; its axes of size 1 do not count.

        Returns
        -------
        bool
            False if the grid has an axis larger than 1 that the map lacks.
        """
        return all(axis in self.axes for axis, size in grid.axes.items() if size > 1)

    def on(self, grid: Grid) -> Algorithm:
        """Return the algorithm without the axes that a grid lacks, which count as axes of size 1.

        Parameters
        ----------
        grid : Grid
            The grid.

        Returns
        -------
        Algorithm
            An algorithm with axes of the grid only.
        """

        def present(layout: Layout) -> Layout:
            return Layout(*[[axis for axis in dim if axis in grid.axes] for dim in layout.dims])

        axes = {axis: letter for axis, letter in self.axes.items() if axis in grid.axes}
        return Algorithm(axes, present(self.a), present(self.b), present(self.c), self.stream)


ALGORITHMS: dict[str, Algorithm] = {
    # A stays put (it is replicated).  A[M, K] . B[K, N_col] -> C[M, N_col]
    "1d-column": Algorithm({"col": "n"}, Layout("col", None), Layout(None, "col"), Layout(None, "col")),
    # A and B stay put.  A[M, K_col] . B[K_col, N] -> C[M, N] {U_col} -> C[M_col, N]
    "1d-row": Algorithm({"col": "k"}, Layout(None, "col"), Layout("col", None), Layout("col", None), "m"),
    # C stays put (van de Geijn & Watts 1997).  A[M_row, K] . B[K, N_col] -> C[M_row, N_col]
    "summa": Algorithm({"row": "m", "col": "n"}, Layout("row", "col"), Layout("row", "col"), Layout("row", "col")),
    # A stays put.  A[M_row, K_col] . B[K_col, N] -> C[M_row, N] {U_col} -> C[M_row, N_col]
    "summa-a": Algorithm(
        {"row": "m", "col": "k"}, Layout("row", "col"), Layout("col", "row"), Layout("row", "col"), "n"
    ),
    # B stays put.  A[M, K_row] . B[K_row, N_col] -> C[M, N_col] {U_row} -> C[M_row, N_col]
    "summa-b": Algorithm(
        {"row": "k", "col": "n"}, Layout("col", "row"), Layout("row", "col"), Layout("row", "col"), "m"
    ),
    # C stays put in each depth layer (Solomonik & Demmel 2011): layer l owns the l-th slice of k, so that no operand is
    # replicated.  A[M_row, K_depth] . B[K_depth, N_col] -> C[M_row, N_col] {U_depth} -> C[M_(row,depth), N_col]
    "2.5d": Algorithm(
        {"row": "m", "col": "n", "depth": "k"},
        Layout("row", ("depth", "col")),
        Layout(("depth", "row"), "col"),
        Layout(("row", "depth"), "col"),
    ),
    # All three move along one axis each (Agarwal et al. 1995): the same map, with another layout of A.
    "3d": Algorithm(
        {"row": "m", "col": "n", "depth": "k"},
        Layout(("row", "col"), "depth"),
        Layout(("depth", "row"), "col"),
        Layout(("row", "depth"), "col"),
    ),
}
"""The presets by name. ``2.5d`` is Solomonik and Demmel's algorithm, not the tensor mode of ``Parallelism``."""


def preset(algorithm: str, grid: Grid) -> Algorithm:
    """Return a named algorithm for a grid.

    Parameters
    ----------
    algorithm : str
        A key of `ALGORITHMS`. ``2.5d`` is the algorithm of Solomonik and Demmel; the tensor mode of this name in
        training is Tesseract, which is another thing.
    grid : Grid
        The grid; axes of the algorithm that it lacks count as axes of size 1.

    Returns
    -------
    Algorithm
        The map and the layouts on this grid.

    Raises
    ------
    GridError
        If there is no such preset, or the grid has an axis that the preset does not use.

    Examples
    --------
    >>> preset("summa", Grid(row=2, col=2)).c
    Layout('row', 'col')
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


class _InPanels(TypedDict, total=False):
    stream: str
    panel: int


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
        The left operand in any layout; in the layout of the `preset` each word moves once.
    b : DistArray, ``[k, n]``
        The right operand in any layout on the same grid, of the same dtype.
    algorithm : str, optional
        ``1d-column``, ``1d-row``, ``summa``, ``summa-a``, ``summa-b``, ``2.5d`` or ``3d``; by default the first of them
        that uses all axes of the grid. ``auto`` takes the map that the cost model expects to be fastest from the
        layouts of the operands, see `options`.
    out : Layout or DistArray, optional
        The layout of the result, or an array to write it into; by default the layout of the preset, or of the map that
        ``auto`` takes.
    alpha, beta : number
        Factors, as in `contract`.
    conj : {"", "a", "b", "ab"}
        The operands that enter as their complex conjugates.
    panel : int, optional
        Compute the product in panels of at most this many indices of the letter that the algorithm streams: k, but n in
        ``summa-a`` and m in ``summa-b`` and ``1d-row``. By default the product is computed whole.
    verify : bool
        Whether to check the result against thin products with random vectors, see ``linalg.verify``. The check costs
        ``10 (1/m + 1/n + 1/k)`` of the flop of the product, and one more thin product if beta is not 0.

    Returns
    -------
    DistArray, ``[m, n]``
        The product in layout `out`, or `out` itself.

    Raises
    ------
    ShapeError
        If the arrays are not matrices, or their k differ.
    GridError
        If there is no such algorithm, or the grid has an axis that it does not use.
    VerificationError
        If `verify` finds the result wrong.

    Notes
    -----
    **Communication:** an allgather of a, an allgather of b and a reduce_scatter of the result over the axes that the
    map gives n, m and k: ``mk(P_n - 1) + kn(P_m - 1) + mn(P_k - 1)`` words received, summed over ranks, if `a` and `b`
    are in the layouts of the preset. Operands in other layouts move to these first.

    Integers are multiplied and summed in the dtype of the operands, as ``numpy.matmul`` has it: products of int8 wrap
    around beyond 127. Cast the operands with `DistArray.astype` where the result needs more bits; `gram`, `syrk` and
    `dot` do so themselves.

    **Adjoint:** `contract` with the same map, see `adjoints`.

    Examples
    --------
    >>> grid = Grid(row=2, col=2)
    >>> a, b = (from_global(np.ones((7, 7)), grid, Layout("row", "col")) for _ in range(2))
    >>> c = matmul(a, b, "summa", panel=2)
    """
    if a.ndim != 2 or b.ndim != 2:
        raise ShapeError(f"matmul of shapes {a.shape} and {b.shape}: both must have 2 dims; contract takes any number")
    if algorithm == "auto":
        best = fastest(GEMM, a, b, out.layout if isinstance(out, DistArray) else out)
        axes, result, stream = best.axes, best.out, "k"
    else:
        if algorithm is None:
            algorithm = next((name for name, choice in ALGORITHMS.items() if choice.fits(a.grid)), "summa")
        choice = preset(algorithm, a.grid)
        axes, result, stream = choice.axes, choice.c, choice.stream
    check = Check(GEMM, a, b, alpha, beta, out, conj) if verify else None
    in_panels: _InPanels = {} if panel is None else {"stream": stream, "panel": panel}
    # A[M, K] . B[K, N] -> C[M, N] in the layout of the preset or `out`
    c = contract(GEMM, a, b, axes, result if out is None else out, alpha=alpha, beta=beta, conj=conj, **in_panels)
    if check:
        check.passes(c)
    return c
