"""Choose the map of a product by its modelled time, and explain the choice."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from colossal_mpi import comm, ledger
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.grid import Grid, GridCache
from colossal_mpi.layout import Layout
from colossal_mpi.linalg.contraction.contract import contract
from colossal_mpi.linalg.contraction.subscripts import Subscripts, extents_of, map_layout, parse
from colossal_mpi.linalg.model.bounds import lower_bound
from colossal_mpi.linalg.model.price import Cost, price
from colossal_mpi.platform import backend


@dataclass(frozen=True)
class Machine:
    """Seconds that a machine takes for a message, a word, a floating-point operation and an addition of a reduction."""

    message: float = 5e-6
    word: float = 2e-9
    flop: float = 4e-11
    add: float = 1e-9
    """For one element that a reduction adds: it is read twice and written once, from memory."""

    def seconds(self, cost: Cost) -> float:
        """Return the modelled time of a product: that of its busiest rank."""
        moved = self.message * cost.messages + self.word * max(cost.words)
        return moved + self.flop * cost.flop + self.add * cost.summed


def calibrate(grid: Grid, words: int = 1 << 18, size: int = 384) -> Machine:
    """Measure a machine with an allgather of one word, one of `words`, a sum of `words` and a product of `size`.

    **Communication:** two allgathers over the whole grid, each three times; the best of them counts.
    """
    flop = _best(grid, lambda: _product(grid, size)) / (2 * size**3)
    block = grid.xp.ones(words)
    add = _best(grid, lambda: backend.synchronize(block + block)) / words
    if grid.size == 1:
        return Machine(0.0, 0.0, flop, add)
    small, large = (_best(grid, partial(_gather, grid, n)) for n in (1, words))
    each = (grid.size - 1) * words
    return Machine(small / max(1, (grid.size - 1).bit_length()), max(large - small, 1e-12) / each, flop, add)


def _best(grid: Grid, work: Callable[[], None]) -> float:
    """Return the best of three times that `work` takes on the slowest rank."""
    taken = []
    for _ in range(3):
        comm.collect(None, grid)
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(max(times) for times in zip(*comm.collect(taken, grid), strict=True))


def _gather(grid: Grid, n: int) -> None:
    comm.allgather(grid.xp.zeros(n), grid, tuple(grid.axes), [n] * grid.size)


def _product(grid: Grid, size: int) -> None:
    block = grid.xp.ones((size, size))
    backend.synchronize(grid.xp.matmul(block, block))


def maps(sub: Subscripts, grid: Grid) -> Iterator[dict[str, str]]:
    """Yield every map of the grid's axes to the letters of a product, axes left out included."""
    axes = [axis for axis, size in grid.axes.items() if size > 1]
    letters = [*dict.fromkeys(sub.a + sub.b), None]
    for choice in itertools.product(letters, repeat=len(axes)):
        yield {axis: letter for axis, letter in zip(axes, choice, strict=True) if letter}


_NARROWEST = 32
"""Indices of the narrowest panel that is tried: a local product of fewer is no faster than memory."""


def spread_layout(sub: Subscripts, axes: Mapping[str, str], grid: Grid) -> Layout:
    """Return the layout of a result that is stored once: cut as the map leaves it and further, innermost, on one dim.

    The k-axes, along which it is reduce-scattered, and those that the map leaves out cut the first dim further.
    """
    made = map_layout(sub.c, axes)
    if not sub.c:
        return made
    rest = [axis for axis, size in grid.axes.items() if size > 1 and axis not in made.cut]
    return Layout((*made.dims[0], *rest), *made.dims[1:])


@dataclass(frozen=True)
class Option:
    """One map of a product, whole or in panels, with its price."""

    axes: Mapping[str, str]
    out: Layout
    cost: Cost
    seconds: float
    stream: str | None = None
    panel: int = 0

    def do(self, subscripts: str, a: DistArray, b: DistArray) -> DistArray:
        """Return the product on this map."""
        return contract(subscripts, a, b, self.axes, self.out, stream=self.stream, panel=self.panel or 1)


def options(
    subscripts: str,
    a: DistArray,
    b: DistArray,
    out: Layout | None = None,
    memory: int | None = None,
    machine: Machine | None = None,
) -> list[Option]:
    """Return every map of a product that fits the memory, fastest first; in panels where it does not fit whole.

    Parameters
    ----------
    subscripts : str
    a, b : DistArray
        Where they lie counts: moves are priced.
    out : Layout, optional
        Of the result; by default each map's own `spread_layout`.
    memory : int, optional
        Elements of workspace that a rank has.
    machine : Machine, optional

    Returns
    -------
    list of Option
        By modelled seconds; ties go against cutting a summed letter, which adds and writes the result once more.

    Raises
    ------
    ShapeError
        If no map fits the memory.
    """
    sub, grid, machine = parse(subscripts), a.grid, machine or Machine()
    found: list[Option] = []
    for axes in maps(sub, grid):
        result = spread_layout(sub, axes, grid) if out is None else out
        found += _ways(sub, a, b, axes, result, memory, machine)
    fitting = [option for option in found if memory is None or option.cost.workspace <= memory]
    if not fitting:
        least = min(option.cost.workspace for option in found)
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
        cost = price(str(sub), extents, a.grid.axes, axes, a.layout, b.layout, out, stream, panel)
        return Option(axes, out, cost, machine.seconds(cost), stream, panel)

    whole = option()
    yield whole
    if memory is None or whole.cost.workspace <= memory:
        return
    for letter, extent in extents.items():
        panel = extent
        while panel > _NARROWEST and option(letter, panel).cost.workspace > memory:
            panel = max(_NARROWEST, panel // 2)
        yield option(letter, max(1, panel))


def fastest(subscripts: str, a: DistArray, b: DistArray, out: Layout | None = None) -> Option:
    """Return the first of `options`; the choice is kept for the grid."""
    key = (subscripts, a.shape, b.shape, a.layout, b.layout, out)
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
    machine: Machine | None = None,
    most: int = 5,
) -> str:
    """Do a product on its best maps and return a table: words predicted and measured, ratio to the bound, time.

    Parameters are those of `options`; `most` maps are tried.

    **Communication:** that of the products, each done twice. Collective: every rank gets the same text.
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
        option.do(subscripts, a, b)  # makes the plans, too
    words = sum(comm.collect(moved.words, a.grid))
    begun = time.perf_counter()
    option.do(subscripts, a, b)
    return words, max(comm.collect(time.perf_counter() - begun, a.grid))


def _line(option: Option, words: int, seconds: float, bound: float) -> str:
    name = " ".join(f"{axis}:{letter}" for axis, letter in option.axes.items()) or "no axis"
    name += f" by {option.panel} of {option.stream}" if option.stream else ""
    busiest = max(option.cost.words)
    ratio = f"{busiest / bound:.3f}" if bound else "-"
    return (
        f"{name:<32}{option.cost.total_words:>14,}{words:>14,}{ratio:>9}{option.cost.workspace:>12,}"
        f"{option.seconds * 1e3:>8.2f} ms{seconds * 1e3:>8.2f} ms"
    )
