"""Layouts: the grid axes that cut each dim of a global array, and the axes over which it is a partial sum.

Every package computes with layouts; they are pure arithmetic and know neither MPI nor arrays. Blocks are balanced and
nested: n elements over p parts give the first ``n mod p`` parts one element more, and a second axis splits each part
again. So any size works on any grid, and every block is one contiguous box of the global array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from colossal_mpi.errors import LayoutError

Axes = tuple[str, ...]
Box = tuple[tuple[int, int], ...]
"""The half-open range ``(start, stop)`` of each dim, in global indices."""


def part(n: int, parts: int, index: int) -> tuple[int, int]:
    """Return the range ``(start, stop)`` of part `index` of `n` elements cut into `parts` balanced parts."""
    size, extra = divmod(n, parts)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)


def _axes(dim: str | Iterable[str] | None) -> Axes:
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, str) else tuple(dim)


@dataclass(frozen=True, init=False)
class Layout:
    """The grid axes that cut each dim, outer to inner, and the axes over which the blocks are partial sums.

    The array is replicated over every axis that is not named. ``Layout("row", "col")`` cuts dim 0 over ``row``
    and dim 1 over ``col``; ``Layout(("data", "row"), None)`` cuts dim 0 over ``data`` and each piece over
    ``row``; ``Layout(None, "col", partial=("depth",))`` holds partial sums over ``depth``.

    Parameters
    ----------
    *dims : str, sequence of str or None
        The axes that cut each dim of the array; None for an uncut dim.
    partial : sequence of str
        The axes over which the global array is the sum of the blocks of the ranks.

    Raises
    ------
    LayoutError
        If an axis is named twice.

    Examples
    --------
    >>> Layout(("data", "row"), "col", partial="depth")
    """

    dims: tuple[Axes, ...]
    partial: Axes

    def __init__(self, *dims: str | Sequence[str] | None, partial: str | Sequence[str] = ()) -> None:
        cut, summed = tuple([_axes(dim) for dim in dims]), _axes(partial)
        named = [axis for axes in cut for axis in axes] + list(summed)
        if len(set(named)) < len(named):
            twice = sorted({axis for axis in named if named.count(axis) > 1})
            raise LayoutError(
                f"{self._text(cut, summed)}: axis {', '.join(twice)} is named twice; "
                "a grid axis cuts one dim, or holds partial sums, once"
            )
        object.__setattr__(self, "dims", cut)
        object.__setattr__(self, "partial", tuple(sorted(summed)))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial))

    @cached_property
    def cut(self) -> Axes:
        """The axes that cut some dim."""
        return tuple(axis for axes in self.dims for axis in axes)

    @cached_property
    def _named(self) -> Axes:
        return (*self.cut, *self.partial)

    @staticmethod
    def _text(dims: tuple[Axes, ...], partial: Axes) -> str:
        names = ["None" if not a else repr(a[0]) if len(a) == 1 else repr(a) for a in dims]
        return f"Layout({', '.join([*names, *([f'partial={partial!r}'] if partial else [])])})"

    def __repr__(self) -> str:
        return self._text(self.dims, self.partial)

    def with_partial(self, *axes: str) -> Layout:
        """Return the same cut with partial sums over other axes.

        Parameters
        ----------
        *axes : str
            All partial axes of the new layout.

        Returns
        -------
        Layout
            The layout; this layout itself if nothing changes.
        """
        return self if axes == self.partial else Layout(*self.dims, partial=axes)

    def on(self, sizes: Mapping[str, int], ndim: int) -> Layout:
        """Return this layout without axes of size 1, checked against a grid and a number of dims.

        Parameters
        ----------
        sizes : mapping of str to int
            The size of each axis of the grid.
        ndim : int
            The number of dims of the array.

        Returns
        -------
        Layout
            The checked layout, which names only axes of size 2 or more.

        Raises
        ------
        LayoutError
            If the layout has another number of dims, or names an axis that the grid lacks.
        """
        if len(self.dims) != ndim:
            raise LayoutError(
                f"{self}: {len(self.dims)} dims for an array of {ndim}; give one entry per dim, None for an uncut one"
            )
        if not self._named:
            return self
        unknown = [axis for axis in self._named if axis not in sizes]
        if unknown:
            raise LayoutError(
                f"{self}: no axis {', '.join(map(repr, unknown))} on this grid; it has {', '.join(sizes) or 'none'}"
            )
        if all(sizes[axis] > 1 for axis in self._named):
            return self
        dims = [tuple(a for a in axes if sizes[a] > 1) for axes in self.dims]
        return Layout(*dims, partial=[a for a in self.partial if sizes[a] > 1])

    def box(self, shape: Sequence[int], sizes: Mapping[str, int], coords: Mapping[str, int]) -> Box:
        """Return the box of global indices that a rank holds.

        Parameters
        ----------
        shape : sequence of int
            The global shape.
        sizes : mapping of str to int
            The size of each axis of the grid.
        coords : mapping of str to int
            The coordinates of the rank.

        Returns
        -------
        box
            The range ``(start, stop)`` of each dim.
        """
        return tuple([bounds(n, axes, sizes, coords) for n, axes in zip(shape, self.dims, strict=True)])

    def owner(self, sizes: Mapping[str, int], coords: Mapping[str, int]) -> bool:
        """Return whether a rank is the first of the ranks that hold its block: at coordinate 0 of the other axes.

        Parameters
        ----------
        sizes : mapping of str to int
            The size of each axis of the grid.
        coords : mapping of str to int
            The coordinates of the rank.

        Returns
        -------
        bool
            True if the rank owns its block.
        """
        return not any(coords[axis] for axis in sizes if axis not in self.cut)

    def owned(self, shape: Sequence[int], sizes: Mapping[str, int], coords: Mapping[str, int]) -> Box | None:
        """Return the box that a rank owns; the boxes of all ranks tile the array.

        Parameters
        ----------
        shape : sequence of int
            The global shape.
        sizes : mapping of str to int
            The size of each axis of the grid.
        coords : mapping of str to int
            The coordinates of the rank.

        Returns
        -------
        box or None
            The range ``(start, stop)`` of each dim; None if the rank owns nothing.
        """
        box = self.box(shape, sizes, coords)
        return box if self.owner(sizes, coords) and 0 not in box_shape(box) else None


def bounds(n: int, axes: Axes, sizes: Mapping[str, int], coords: Mapping[str, int]) -> tuple[int, int]:
    """Return the range ``(start, stop)`` of `n` elements that nested cuts over `axes` leave to the rank at `coords`."""
    start, length = 0, n
    for axis in axes:
        low, high = part(length, sizes[axis], coords[axis])
        start, length = start + low, high - low
    return start, start + length


def coords_of(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the coordinates of `rank` among ranks in row-major order of axes of these sizes."""
    coords = {}
    for axis in reversed(list(sizes)):
        rank, coords[axis] = divmod(rank, sizes[axis])
    return dict(reversed(coords.items()))


def rank_of(coords: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return the rank at `coords` among ranks in row-major order of axes of these sizes."""
    rank = 0
    for axis, size in sizes.items():
        rank = rank * size + coords[axis]
    return rank


def box_shape(box: Box) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple([stop - start for start, stop in box])


def index_of(box: Box) -> tuple[slice, ...]:
    """Return the slices of `box` in the global array."""
    return tuple(slice(start, stop) for start, stop in box)


def intersect(a: Box, b: Box) -> Box:
    """Return the common part of two boxes; an empty extent is ``(start, start)``."""
    return tuple((max(a0, b0), max(max(a0, b0), min(a1, b1))) for (a0, a1), (b0, b1) in zip(a, b, strict=True))


def slices(box: Box, origin: Box) -> tuple[slice, ...]:
    """Return the slices of `box` inside the block whose global box is `origin`; empty extents give ``0:0``."""
    return tuple([slice(a - o, b - o) if a < b else slice(0, 0) for (a, b), (o, _) in zip(box, origin, strict=True)])
