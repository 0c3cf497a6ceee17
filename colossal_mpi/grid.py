"""Grids: MPI ranks arranged along named axes, their communicators and their device.

Every array lies on a grid. The packages above ask it for communicators and blocks, and keep their plans for it in a
`GridCache`. It calls MPI, `colossal_mpi.platform` for the device and the shared memory, and `colossal_mpi.meta` for
grids without ranks.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import ArrayLike, DTypeLike

from colossal_mpi import dlpack, layout, runtime
from colossal_mpi.errors import GridError
from colossal_mpi.meta import communicator
from colossal_mpi.platform import backend, cuda_aware, shared_memory
from colossal_mpi.platform.backend import Block


def world_size() -> int:
    """Return the number of ranks that the launcher started; 1 in a process that is no rank, such as a rank's child."""
    return MPI.COMM_WORLD.Get_size() if MPI.Is_initialized() and not MPI.Is_finalized() else 1


def world_rank() -> int:
    """Return this process's rank among those that the launcher started; 0 in a process that is no rank."""
    return MPI.COMM_WORLD.Get_rank() if MPI.Is_initialized() and not MPI.Is_finalized() else 0


_on_split: Callable[[Grid, tuple[str, ...]], None] | None = None


def before_split(function: Callable[[Grid, tuple[str, ...]], None]) -> None:
    """Have a function called before a grid makes the communicators of some axes; comm registers its check here."""
    global _on_split
    _on_split = function


class Grid:
    """Ranks arranged along named axes, outermost first.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The communicator of the ranks; ``COMM_WORLD`` by default.
    device : {"auto", "cpu", "cuda"}
        The device on which blocks are made. ``auto`` takes a GPU, by the rank on the node, if CuPy finds one.
    **axes : int
        The size of each axis, outermost first. The product must be the number of ranks.

    Attributes
    ----------
    axes : mapping of str to int
        The size of each axis, outermost first.
    coords : mapping of str to int
        This rank's coordinate on each axis.
    rank, size : int
        This rank in row-major order of the coordinates, and the number of ranks.
    device : str
        ``"cpu"`` or ``"cuda:<i>"``.
    xp : array namespace
        The array library in which blocks of this grid are made.
    awareness : Awareness
        Whether blocks on a GPU are given to MPI as they are or copied through host memory, and why.
    shares : bool
        Whether ranks of one node read each other's large blocks where they lie; the same on all ranks.

    Raises
    ------
    GridError
        If a size is not a positive integer or the product is not the number of ranks, or if the ranks name different
        axes or have different files of this package.
    LaunchError
        If this process is no rank: a rank started it, or MPI is not initialised.

    Notes
    -----
    **Communication:** collective over `comm`: the ranks agree on the axes, and one ``MPI_Cart_create`` without
    reordering. Sub-communicators are made by
    ``MPI_Cart_sub`` when they are first used, and kept.

    Examples
    --------
    >>> grid = Grid(row=2, col=2)
    >>> grid.coords["row"]
    """

    parent: Grid | None = None
    """The grid of which `at` made this sub-grid; None for other grids."""

    def __init__(self, comm: MPI.Intracomm | None = None, device: str = "auto", **axes: int) -> None:
        runtime.require_mpi()
        comm = MPI.COMM_WORLD if comm is None else comm
        runtime.require_equal(
            comm,
            {"its axes": axes, "its device": device, "COLOSSAL_MPI_CHECK": os.environ.get("COLOSSAL_MPI_CHECK")},
            GridError,
            f"Grid({_text(axes)})",
            _ALIKE,
        )
        _check(axes, comm.Get_size())
        self._cart: Any = comm.Create_cart(list(axes.values()), reorder=False) if axes else comm
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.device = backend.resolve_device(device, node.Get_rank())
        self._node: int = node.bcast(comm.Get_rank())
        self.awareness = cuda_aware.agreed(self.device, comm, node)
        self.shares: bool = comm.allreduce(self.device == "cpu" and shared_memory.wanted(), MPI.LAND)
        node.Free()
        self._part = False
        self._settle({axis: operator.index(size) for axis, size in axes.items()})

    @classmethod
    def meta(cls, rank: int = 0, **axes: int) -> Grid:
        """Return a grid of any number of ranks, seen from one rank, without the other ranks and without memory.

        A program that runs on it is a dry run: blocks are meta arrays (`colossal_mpi.meta`), which have only a shape
        and a dtype. Messages have no effect, but the ledger counts them. Where all ranks collect objects, this rank's
        object stands for each of theirs.

        Parameters
        ----------
        rank : int
            The rank that this process plays.
        **axes : int
            The size of each axis, outermost first.

        Returns
        -------
        Grid
            The grid.

        Raises
        ------
        GridError
            If a size is not a positive integer or there is no such rank.

        Examples
        --------
        >>> grid = Grid.meta(data=64, row=8, col=8)
        """
        total = math.prod(axes.values())
        _check(axes, total)
        if not 0 <= rank < total:
            raise GridError(f"Grid.meta({_text(axes)}): the rank must be from 0 to {total - 1}, not {rank}")
        grid = cls.__new__(cls)
        coords = layout.coords_of(rank, axes)
        grid._cart = communicator.Communicator(list(axes.values()), list(coords.values()), MPI.REQUEST_NULL)
        grid.device, grid._node, grid.shares, grid._part = f"{communicator.NAME}:0", 0, False, True
        grid.awareness = cuda_aware.Awareness(True, "a meta grid sends nothing")
        grid._settle({axis: operator.index(size) for axis, size in axes.items()})
        return grid

    @property
    def is_meta(self) -> bool:
        """True if the blocks of this grid are meta arrays, which have no memory."""
        return self.device.startswith(communicator.NAME)

    def _settle(self, axes: dict[str, int]) -> None:
        self.axes = MappingProxyType(axes)
        self.rank, self.size = self._cart.Get_rank(), self._cart.Get_size()
        self.coords = MappingProxyType(self.coords_of(self.rank))
        self._subs: dict[tuple[str, ...], MPI.Intracomm] = {tuple(axes): self._cart}
        self._slices: dict[tuple[tuple[str, int], ...], Grid] = {}
        self.xp = backend.device_namespace(self.device)
        self._peers: dict[tuple[str, ...], list[shared_memory.Memory] | None] = {}
        self._numbers: dict[tuple[str, ...], Iterator[int]] = {}

    def coords_of(self, rank: int, axes: Sequence[str] | None = None) -> dict[str, int]:
        """Return the coordinates of a rank of a group.

        Parameters
        ----------
        rank : int
            A rank of the group.
        axes : sequence of str, optional
            The axes that span the group; all of them by default.

        Returns
        -------
        dict of str to int
            The coordinate on each axis of the group.

        Raises
        ------
        GridError
            If the grid has no such axis.
        """
        group = tuple(self.axes) if axes is None else self.ordered(axes)
        return layout.coords_of(rank, {axis: self.axes[axis] for axis in group})

    def ordered(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Return axes in the order of the grid, which orders the ranks of their group.

        Parameters
        ----------
        axes : sequence of str
            Axes of the grid, in any order.

        Returns
        -------
        tuple of str
            The axes, outermost first.

        Raises
        ------
        GridError
            If the grid has no such axis.
        """
        unknown = [axis for axis in axes if axis not in self.axes]
        if unknown:
            raise GridError(f"no axis {', '.join(map(repr, unknown))} on {self}")
        return tuple(axis for axis in self.axes if axis in axes)

    def extent(self, axes: Sequence[str]) -> int:
        """Return the number of ranks of a group.

        Parameters
        ----------
        axes : sequence of str
            The axes that span the group.

        Returns
        -------
        int
            The product of their sizes.

        Raises
        ------
        GridError
            If the grid has no such axis.
        """
        return math.prod(self.axes[axis] for axis in self.ordered(axes))

    def comm(self, axes: Sequence[str]) -> MPI.Intracomm:
        """Return the communicator of the ranks that differ from this rank only along some axes.

        Parameters
        ----------
        axes : sequence of str
            The axes that span the group.

        Returns
        -------
        mpi4py.MPI.Intracomm
            The communicator, whose ranks are in row-major order of the axes of the grid.

        Raises
        ------
        GridError
            If the grid has no such axis or was freed.

        Notes
        -----
        **Communication:** collective over the grid when it is first called for these axes.
        """
        key = self.ordered(axes)
        if self._cart == MPI.COMM_NULL:
            raise GridError(f"{self} was freed, by free() or at the end of its with block: make another grid")
        if key not in self._subs:
            if _on_split is not None:
                _on_split(self, key)
            self._subs[key] = self._cart.Sub([axis in key for axis in self.axes])
        return self._subs[key]

    def next_number(self, axes: Sequence[str]) -> int:
        """Return the next number of a group: 0, 1, 2, ...

        Ranks that take their numbers in the same order get the same number for the same operation, without
        communication.

        Parameters
        ----------
        axes : sequence of str
            The axes that span the group.

        Returns
        -------
        int
            The number.
        """
        return next(self._counter(self.ordered(axes)))

    def _counter(self, key: tuple[str, ...]) -> Iterator[int]:
        return self._numbers.setdefault(key, itertools.count())

    def peers(self, axes: Sequence[str]) -> list[shared_memory.Memory] | None:
        """Return the shareable memory of each rank of a group, for reading.

        Parameters
        ----------
        axes : sequence of str
            The axes that span the group.

        Returns
        -------
        list of mmap.mmap or None
            The memory of rank 0, 1, ... of the group; None on all of its ranks if some of it cannot be read.

        Notes
        -----
        **Communication:** collective over the group when it is first called for these axes.
        """
        key = self.ordered(axes)
        if not self.shares:
            return None
        if key not in self._peers:
            group = self.comm(key)
            addresses = group.allgather((self._node, shared_memory.address()))
            near = all(node == self._node and address for node, address in addresses)
            mapped = [shared_memory.mapped(address) for _, address in addresses] if near else [None]
            memories = [memory for memory in mapped if memory is not None]
            self._peers[key] = memories if all(group.allgather(len(memories) == len(addresses))) else None
        return self._peers[key]

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> Block:
        """Return an uninitialised block on this grid's device.

        Parameters
        ----------
        shape : sequence of int
            The shape of the block.
        dtype : dtype or str
            The dtype of its elements.

        Returns
        -------
        array
            The block; a large one lies where the other ranks of the node can read it.
        """
        if self.shares and self.size > 1:
            return shared_memory.empty(shape, backend.numpy_dtype(dtype))
        return self.xp.empty(tuple(shape), dtype=backend.dtype_of(self.xp, dtype))

    def to_block(self, block: ArrayLike | Block, dtype: DTypeLike | None = None) -> Block:
        """Return a copy of an array as a block on this grid's device.

        Parameters
        ----------
        block : array_like
            The values: an array, lists of numbers, or a PyTorch tensor, which is taken without its graph.
        dtype : dtype or str, optional
            The dtype of the copy; by default that of the values.

        Returns
        -------
        array
            The copy; a large one lies where the other ranks of the node can read it.
        """
        block = dlpack.values_of(block)
        if self.device == "cpu" and backend.device_of(block) is not None:
            block = backend.to_host(block)
        if not (self.shares and self.size > 1):
            return self.xp.asarray(block, dtype=backend.dtype_of(self.xp, dtype), copy=True)
        whole = np.asarray(block)
        copy = self.empty(whole.shape, whole.dtype if dtype is None else dtype)
        copy[...] = whole
        return copy

    def at(self, **coords: int) -> Grid:
        """Return the sub-grid of the ranks at some coordinates, without these axes.

        Parameters
        ----------
        **coords : int
            This rank's coordinate on each axis that the sub-grid leaves out.

        Returns
        -------
        Grid
            The sub-grid, the same object each time.

        Raises
        ------
        GridError
            If the grid has no such axis or this rank does not lie there.

        Notes
        -----
        **Communication:** collective over the grid when it is first called for these axes: every rank passes its own
        coordinates.

        Examples
        --------
        >>> layer = grid.at(depth=grid.coords["depth"])
        """
        self.ordered(tuple(coords))
        if any(self.coords[axis] != index for axis, index in coords.items()):
            raise GridError(f"at({_text(coords)}): this rank lies at {_text(self.coords)}; pass its own coordinates")
        key = tuple(sorted(coords.items()))
        if key not in self._slices:
            rest = {axis: size for axis, size in self.axes.items() if axis not in coords}
            sub = Grid.__new__(Grid)
            sub._cart, sub._node, sub.shares = self.comm(tuple(rest)), self._node, self.shares
            sub.device, sub.awareness, sub._part = self.device, self.awareness, True
            sub.parent = self
            sub._settle(rest)
            sub._numbers[tuple(rest)] = self._counter(tuple(rest))  # both use one communicator
            self._slices[key] = sub
        return self._slices[key]

    def has_subgrid(self, other: Grid) -> bool:
        """Return whether another grid is a sub-grid that `at` made of this one.

        Parameters
        ----------
        other : Grid
            Another grid.

        Returns
        -------
        bool
            True if it is a sub-grid of this one.
        """
        return any(sub is other for sub in self._slices.values())

    def free(self) -> None:
        """Free the communicators of this grid, which cannot be used afterwards; MPI has only some two thousand.

        A grid is also a context manager that frees them at its end. The communicator of all ranks of a sub-grid belongs
        to its parent and is not freed.

        Notes
        -----
        **Communication:** collective over the grid.
        """
        if self._cart == MPI.COMM_NULL:
            return
        self._release()
        if self.axes and not self._part:
            self._cart.Free()

    def _release(self) -> None:
        """Free the communicators that were split from this grid's own one, and the cached values of the grid."""
        GridCache.forget(self)
        for sub in self._slices.values():
            sub._release()
        for axes, group in self._subs.items():
            if axes != tuple(self.axes):
                group.Free()
        self._slices, self._subs = {}, {tuple(self.axes): self._cart}

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __deepcopy__(self, memo: object) -> Grid:
        return self  # one rank alone cannot copy communicators: copied arrays stay on their grid

    def __repr__(self) -> str:
        return f"Grid({_text(self.axes)})" if self.axes else "Grid()"


K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class GridCache(Generic[K, V]):
    """Values that a module keeps for each grid: the plans of its redistributions, for example.

    A grid's values are dropped when the grid is freed or nothing refers to it any more.

    Parameters
    ----------
    limit : int
        The greatest number of values kept for one grid; the least recently used is dropped first.

    Examples
    --------
    >>> _PLANS = GridCache[tuple[Shape, Layout, Layout], Plan](limit=4096)
    >>> plan = _PLANS.get(grid, (shape, source, target), lambda: make_plan(shape, source, target, grid))
    """

    _all: ClassVar[weakref.WeakSet[GridCache[Any, Any]]] = weakref.WeakSet()

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._of: weakref.WeakKeyDictionary[Grid, OrderedDict[K, V]] = weakref.WeakKeyDictionary()
        GridCache._all.add(self)

    def get(self, grid: Grid, key: K, make: Callable[[], V]) -> V:
        """Return the value that is kept for a grid under a key.

        Parameters
        ----------
        grid : Grid
            The grid.
        key : hashable
            The key.
        make : callable
            A function that makes the value if none is kept.

        Returns
        -------
        object
            The value. If there are too many now, the one that was not used for longest is dropped.
        """
        values = self.of(grid)
        if key not in values:
            values[key] = make()
            if len(values) > self._limit:
                values.popitem(last=False)
        values.move_to_end(key)
        return values[key]

    def of(self, grid: Grid) -> OrderedDict[K, V]:
        """Return the values that are kept for a grid, the most recently used last."""
        values = self._of.get(grid)
        if values is None:
            values = self._of[grid] = OrderedDict()
        return values

    @classmethod
    def forget(cls, grid: Grid) -> None:
        """Drop the values that all caches keep for a grid."""
        for cache in cls._all:
            cache._of.pop(grid, None)


_ALIKE = "name the same axes with the same sizes in the same order on all ranks"


def _text(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in axes.items())


def _check(axes: dict[str, int], ranks: int) -> None:
    for axis, size in axes.items():
        if not hasattr(size, "__index__") or size < 1:
            raise GridError(f"Grid({_text(axes)}): the size of {axis} must be a positive integer, not {size!r}")
    need = math.prod(axes.values())
    if need != ranks:
        raise GridError(
            f"Grid({_text(axes)}) needs {need} ranks and there are {ranks}: start {need} (mpiexec -n {need} ...) "
            f"or choose sizes whose product is {ranks}"
        )
