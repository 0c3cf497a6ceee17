"""The map of a product that a machine finishes first, and an explanation of the choice.

``matmul(algorithm="auto")`` calls `fastest`; users call `options` and `explain`. Every map of the grid's axes to the
letters is priced (`price`), and the map is executed by ``contraction.contract``.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from colossal_mpi import comm, ledger
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.grid import Grid, GridCache
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of, map_layout, parse
from colossal_mpi.linalg.model.bounds import lower_bound
from colossal_mpi.linalg.model.price import Price, price
from colossal_mpi.machine import TYPICAL, Machine
from colossal_mpi.platform import backend


def maps(sub: Subscripts, grid: Grid) -> Iterator[dict[str, str]]:
    """Yield every map of the grid's axes to the letters of a product, including maps that leave axes out."""
    axes = [axis for axis, size in grid.axes.items() if size > 1]
    letters = [*dict.fromkeys(sub.a + sub.b), None]
    for choice in itertools.product(letters, repeat=len(axes)):
        yield {axis: letter for axis, letter in zip(axes, choice, strict=True) if letter}


_NARROWEST = 32
"""Width of the narrowest panel that is tried: the gemm of a narrower one is no faster than memory."""


def spread_layout(sub: Subscripts, axes: Mapping[str, str], grid: Grid) -> Layout:
    """Return a layout that stores the result of a map once.

    The map cuts the dims of the result. The axes of k, over which the result is reduce-scattered, and the axes that the
    map leaves out cut the first dim further, innermost.
    """
    mapped = map_layout(sub.c, axes)
    if not sub.c:
        return mapped
    rest = [axis for axis, size in grid.axes.items() if size > 1 and axis not in mapped.cut]
    # C[M_row, N_col] {U_depth} -> C[M_(row,depth), N_col]: reduce_scatter over depth
    return Layout((*mapped.dims[0], *rest), *mapped.dims[1:])


@dataclass(frozen=True)
class Option:
    """One map of a product, done whole or in panels, with its price.

    Parameters
    ----------
    axes : mapping of str to str
        The map: the letter that each axis cuts.
    out : Layout
        Layout of the result.
    price : Price
        Words, messages, flop and workspace.
    seconds : float
        Time of the busiest rank on the machine that was asked for.
    stream : str, optional
        The letter of the panels; None if the product is done whole.
    panel : int
        Width of a panel; 0 if the product is done whole.
    """

    axes: Mapping[str, str]
    out: Layout
    price: Price
    seconds: float
    stream: str | None = None
    panel: int = 0

    def run(self, subscripts: str, a: DistArray, b: DistArray) -> DistArray:
        """Return the product, done on this map.

        Parameters
        ----------
        subscripts : str
            The product, such as ``"mk,kn->mn"``.
        a, b : DistArray
            The operands that the option was priced for.

        Returns
        -------
        DistArray
            The result in the layout `out`.

        Notes
        -----
        **Communication:** `price` has the words that each rank receives.
        """
        return contract(subscripts, a, b, self.axes, self.out, stream=self.stream, panel=self.panel or 1)


def options(
    subscripts: str,
    a: DistArray,
    b: DistArray,
    out: Layout | None = None,
    memory: int | None = None,
    machine: Machine = TYPICAL,
) -> list[Option]:
    """Return every map of a product that fits the memory, the fastest first, in panels where it does not fit whole.

    Parameters
    ----------
    subscripts : str
        The product, such as ``"mk,kn->mn"``.
    a, b : DistArray
        The operands. Their layouts count, because the moves to each map are priced.
    out : Layout, optional
        Layout of the result; by default each map stores the result once, cut as the map leaves it.
    memory : int, optional
        Array elements of workspace that a rank has; by default there is no limit.
    machine : Machine
        The machine that computes and moves words, such as `colossal_mpi.machine.measure` returns it.

    Returns
    -------
    list of Option
        The maps by their modelled seconds. Ties go against cutting a summed letter, which adds and writes the result
        once more.

    Raises
    ------
    ShapeError
        If no map fits the memory.

    Examples
    --------
    >>> best = linalg.options("mk,kn->mn", a, b, machine=measure(a.grid))[0]
    >>> c = best.run("mk,kn->mn", a, b)
    """
    sub, grid = parse(subscripts), a.grid
    found: list[Option] = []
    for axes in maps(sub, grid):
        result = spread_layout(sub, axes, grid) if out is None else out
        found += _ways(sub, a, b, axes, result, memory, machine)
    fitting = [option for option in found if memory is None or option.price.workspace <= memory]
    if not fitting:
        least = min(option.price.workspace for option in found)
        raise ShapeError(
            f"{subscripts} on {grid} needs {least:,} elements of workspace on a rank, and memory is {memory:,}: "
            "use more ranks or more memory"
        )
    return sorted(fitting, key=lambda option: (option.seconds, _cut_parts(option, sub, grid), len(option.axes)))


def _ways(
    sub: Subscripts,
    a: DistArray,
    b: DistArray,
    axes: Mapping[str, str],
    out: Layout,
    memory: int | None,
    machine: Machine,
) -> Iterator[Option]:
    """Yield a map whole and, where that does not fit the memory, in the widest panels of each letter that do."""
    extents = extents_of(sub, a.shape, b.shape)

    def option(stream: str | None = None, panel: int = 0) -> Option:
        priced = price(str(sub), extents, a.grid.axes, axes, a.layout, b.layout, out, stream, panel)
        return Option(axes, out, priced, priced.seconds(machine, backend.numpy_dtype(a.dtype).itemsize), stream, panel)

    whole = option()
    yield whole
    if memory is None or whole.price.workspace <= memory:
        return
    for letter, extent in extents.items():
        panel = extent
        while panel > _NARROWEST and option(letter, panel).price.workspace > memory:
            panel = max(_NARROWEST, panel // 2)
        yield option(letter, max(1, panel))


def fastest(subscripts: str, a: DistArray, b: DistArray, out: Layout | None = None) -> Option:
    """Return the fastest map of a product on a typical machine, and keep the choice for the next such product.

    Parameters
    ----------
    subscripts : str
        The product, such as ``"mk,kn->mn"``.
    a, b : DistArray
        The operands.
    out : Layout, optional
        Layout of the result; by default each map stores the result once, cut as the map leaves it.

    Returns
    -------
    Option
        The first of `options`.
    """
    key = (subscripts, a.shape, b.shape, a.dtype, a.layout, b.layout, out)
    return _CHOICES.get(a.grid, key, lambda: options(subscripts, a, b, out)[0])


_CHOICES = GridCache[Hashable, Option](limit=1024)


def _cut_parts(option: Option, sub: Subscripts, grid: Grid) -> int:
    return grid.extent([axis for axis, letter in option.axes.items() if letter in sub.k])


def explain(
    subscripts: str,
    a: DistArray,
    b: DistArray,
    out: Layout | None = None,
    memory: int | None = None,
    machine: Machine = TYPICAL,
    most: int = 5,
) -> str:
    """Run a product on its best maps and return a table of priced and measured words and seconds.

    Parameters
    ----------
    subscripts : str
        The product, such as ``"mk,kn->mn"``.
    a, b : DistArray
        The operands.
    out : Layout, optional
        Layout of the result; by default each map stores the result once, cut as the map leaves it.
    memory : int, optional
        Array elements of workspace that a rank has; by default there is no limit.
    machine : Machine
        The machine whose times are predicted, such as `colossal_mpi.machine.measure` returns it.
    most : int
        The number of maps that are run.

    Returns
    -------
    str
        The table, the same on all ranks. A line for each map has the words of all ranks as priced and as the ledger
        counts them, the words of the busiest rank over the `lower_bound`, the workspace in array elements, and the
        predicted and the measured time.

    Raises
    ------
    ShapeError
        If no map fits the memory.

    Notes
    -----
    **Communication:** each product runs twice; gathers of numbers follow.

    Examples
    --------
    >>> print(linalg.explain("mk,kn->mn", a, b, machine=measure(a.grid)))
    """
    sub, grid = parse(subscripts), a.grid
    sizes = extents_of(sub, a.shape, b.shape)
    m, n, k = (math.prod(sizes[x] for x in letters) for letters in (sub.m, sub.n, sub.k))
    bound = lower_bound(m, n, k, grid.size)
    lines = [
        f"{subscripts}: m={m:,} n={n:,} k={k:,} on {grid}; lower bound {bound:,.0f} words on a rank",
        f"{'map':<32}{'words':>14}{'measured':>14}{'x bound':>9}{'workspace':>12}{'predicted':>11}{'measured':>11}",
    ]
    for option in options(subscripts, a, b, out, memory, machine)[:most]:
        lines.append(_line(option, *_measure(subscripts, a, b, option), bound))
    return "\n".join(lines)


def _measure(subscripts: str, a: DistArray, b: DistArray, option: Option) -> tuple[int, float]:
    with ledger.record() as moved:
        option.run(subscripts, a, b)  # makes the plans, too
    words = sum(comm.collect(moved.words, a.grid))
    begun = time.perf_counter()
    option.run(subscripts, a, b)
    return words, max(comm.collect(time.perf_counter() - begun, a.grid))


def _line(option: Option, words: int, seconds: float, bound: float) -> str:
    name = " ".join(f"{axis}:{letter}" for axis, letter in option.axes.items()) or "no axis"
    name += f" by {option.panel} of {option.stream}" if option.stream else ""
    busiest = max(option.price.words)
    ratio = f"{busiest / bound:.3f}" if bound else "-"
    return (
        f"{name:<32}{option.price.total_words:>14,}{words:>14,}{ratio:>9}{option.price.workspace:>12,}"
        f"{option.seconds * 1e3:>8.2f} ms{seconds * 1e3:>8.2f} ms"
    )
