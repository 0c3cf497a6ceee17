"""Parts of a distributed array by NumPy's basic indexing.

`DistArray.__getitem__` calls it, and it calls `colossal_mpi.redistribution.execute`. Along a dim that no axis cuts, the
index is applied to the block: a view, which costs nothing. Along a cut dim each rank first takes the elements that it
holds, whose positions in the part are contiguous whatever the step. Then one all_to_all over the axes that cut the
indexed dims balances the part again: every rank receives exactly the elements that it lacks. Partial sums stay partial.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from colossal_mpi.errors import IndexingError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, bounds
from colossal_mpi.platform.backend import Block
from colossal_mpi.redistribution.execute import exchange
from colossal_mpi.redistribution.plan import group_coords, plan_exchange

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pick:
    """The elements ``start + i step`` of a dim, for i from 0 to ``count - 1``."""

    start: int
    step: int
    count: int
    keep: bool
    """True if the result has the dim; False for an integer."""

    def held(self, low: int, high: int) -> tuple[int, int]:
        """Return the range ``(start, stop)`` of the i whose elements lie in ``low:high``."""
        step = abs(self.step)
        if self.step > 0:
            first, last = -((self.start - low) // step), -((self.start - high) // step)
        else:
            first, last = (self.start - high) // step + 1, (self.start - low) // step + 1
        first = min(max(first, 0), self.count)
        return first, min(max(last, first), self.count)

    def local(self, low: int, high: int) -> slice:
        """Return the slice that picks from a block which holds the elements ``low:high``."""
        first, last = self.held(low, high)
        if first == last:
            return slice(0, 0)
        stop = self.start + last * self.step - low
        return slice(self.start + first * self.step - low, None if stop < 0 else min(stop, high - low), self.step)


_NEW = Pick(0, 1, 1, True)
"""A new dim of size 1, for None."""


def parse(index: object, shape: Shape) -> list[Pick | None]:
    """Return which elements an index picks along each dim; None stands for a new dim.

    Raises
    ------
    IndexingError
        If an entry is no integer, slice, ellipsis or None, an integer is out of range, or there are too many entries.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    named = sum(entry is not None and entry is not Ellipsis for entry in entries)
    dots = sum(entry is Ellipsis for entry in entries)
    if named > len(shape) or dots > 1:
        raise IndexingError(f"[{_text(index)}] of shape {shape}: at most {len(shape)} indices and one ellipsis")
    rest = [slice(None)] * (len(shape) - named)
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), None)
    entries = [*entries, *rest] if at is None else [*entries[:at], *rest, *entries[at + 1 :]]
    sizes = iter(enumerate(shape))
    return [None if entry is None else _pick(entry, *next(sizes), index, shape) for entry in entries]


def _pick(entry: object, dim: int, n: int, index: object, shape: Shape) -> Pick:
    if isinstance(entry, slice):
        try:
            start, stop, step = entry.indices(n)
        except (TypeError, ValueError) as problem:
            raise IndexingError(f"[{_text(index)}] of shape {shape}: {problem}") from None
        return Pick(start, step, len(range(start, stop, step)), True)
    try:
        at = _integer(entry)
    except TypeError:
        raise IndexingError(
            f"[{_text(index)}] of shape {shape}: {type(entry).__name__} cannot index a DistArray; use integers, "
            "slices, ... and None, or multiply by a mask"
        ) from None
    if not -n <= at < n:
        raise IndexingError(f"[{_text(index)}] of shape {shape}: {at} is out of range for dim {dim} of size {n}")
    return Pick(at % n, 1, 1, False)


def _integer(entry: Any) -> int:
    if isinstance(entry, bool):
        raise TypeError("NumPy takes it for a mask")
    return operator.index(entry)


def _text(index: object) -> str:
    def one(entry: object) -> str:
        if isinstance(entry, slice):
            bounds = f"{'' if entry.start is None else entry.start}:{'' if entry.stop is None else entry.stop}"
            return bounds if entry.step is None else f"{bounds}:{entry.step}"
        return "..." if entry is Ellipsis else repr(entry) if isinstance(entry, int | None) else type(entry).__name__

    return ", ".join(map(one, index if isinstance(index, tuple) else (index,)))


def select(block: Block, shape: Shape, layout: Layout, index: object, grid: Grid) -> tuple[Block, Shape, Layout]:
    """Return this rank's block of a part of a global array, the global shape of the part and its layout.

    A dim keeps the axes that cut it. An integer drops its dim, and the part is replicated over the axes that cut it.

    Parameters
    ----------
    block : array
        This rank's block of the array of global `shape` in `layout`.
    shape : tuple of int
        The global shape.
    layout : Layout
        The layout.
    index : int, slice, ellipsis, None or tuple of these
        An index as NumPy's basic indexing takes it.
    grid : Grid
        The grid.

    Returns
    -------
    block : array
        This rank's block of the part; a view where nothing moves.
    shape : tuple of int
        The global shape of the part.
    layout : Layout
        The layout of the part.

    Raises
    ------
    IndexingError
        If the index is out of range or of another kind.

    Notes
    -----
    **Communication:** none along dims that no axis cuts or that are taken whole; else an all_to_all over the axes that
    cut the others, in which a rank receives the elements of its block of the result that it did not hold.
    **Adjoint:** the cotangent, put into zeros of the whole shape.
    """
    entries = parse(index, shape)
    picks = [pick for pick in entries if pick is not None]
    box = layout.box(shape, grid.axes, grid.coords)
    block = block[tuple(pick.local(*extent) for pick, extent in zip(picks, box, strict=True))]
    block = _balanced(block, shape, layout, picks, grid)
    cut = iter(layout.dims)
    dims = [(_NEW, ()) if pick is None else (pick, next(cut)) for pick in entries]
    kept = [(pick.count, axes) for pick, axes in dims if pick.keep]
    if len(kept) < len(dims) or len(picks) < len(dims):
        block = block[tuple(None if pick is None else slice(None) if pick.keep else 0 for pick in entries)]
    return block, tuple(n for n, _ in kept), Layout(*[axes for _, axes in kept], partial=layout.partial)


def _balanced(block: Block, shape: Shape, layout: Layout, picks: list[Pick], grid: Grid) -> Block:
    """Return this rank's block of the part after it has been balanced over the ranks."""
    whole = [pick == Pick(0, 1, n, True) for pick, n in zip(picks, shape, strict=True)]
    axes = grid.ordered([axis for cut, same in zip(layout.dims, whole, strict=True) if not same for axis in cut])
    group = group_coords(axes, grid)
    have = [_have(shape, layout, picks, grid, at) for at in group]
    want = [_want(layout, picks, grid, at) for at in group]
    # X[M_axes] -> X[M_axes], M the indices of the part: all_to_all over the axes that cut the indexed dims
    return block if have == want else exchange(block, plan_exchange(have, want, axes, grid), grid)


def _have(shape: Shape, layout: Layout, picks: list[Pick], grid: Grid, at: dict[str, int]) -> Box:
    """Return the box of the part's indices that the rank at `at` holds before the exchange."""
    return tuple(pick.held(*extent) for pick, extent in zip(picks, layout.box(shape, grid.axes, at), strict=True))


def _want(layout: Layout, picks: list[Pick], grid: Grid, at: dict[str, int]) -> Box:
    """Return the box of the part's indices that the rank at `at` holds after the exchange."""
    dims = zip(picks, layout.dims, strict=True)
    return tuple(bounds(pick.count, axes if pick.keep else (), grid.axes, at) for pick, axes in dims)
