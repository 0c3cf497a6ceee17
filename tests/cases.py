"""Layouts, arrays with known values, and blocks computed by NumPy alone, for the tests of core and linalg."""

import itertools
import math
import random

import numpy as np

from colossal_mpi import ColossalError, DistArray, Layout, comm
from colossal_mpi.platform import backend


def layouts(ndim, axes, partial=True):
    """Return every layout of `ndim` dims over some of `axes`, in every order of nesting."""
    found = []
    for places in itertools.product([None, *(["sum"] if partial else []), *range(ndim)], repeat=len(axes)):
        of_dim = [[axis for axis, place in zip(axes, places, strict=True) if place == d] for d in range(ndim)]
        summed = [axis for axis, place in zip(axes, places, strict=True) if place == "sum"]
        orders = itertools.product(*(itertools.permutations(names) for names in of_dim))
        found += [Layout(*dims, partial=summed) for dims in orders]
    return found


def some(cases, most, seed=0):
    """Return all of `cases`, or `most` of them, the same draw on every rank."""
    cases = list(cases)
    return cases if len(cases) <= most else random.Random(seed).sample(cases, most)


def integers(shape, dtype="float64", seed=0):
    """Return an array of small integers, whose sums and products are exact in any dtype."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-9, 10, shape)
    return (values + 1j * rng.integers(-9, 10, shape) if np.dtype(dtype).kind == "c" else values).astype(dtype)


def on(grid, values):
    """Return a NumPy array as a block on the device of `grid`."""
    return grid.xp.asarray(values)


def host(array):
    """Return the block of a DistArray, or a block, as a NumPy array."""
    return backend.to_host(array.local if isinstance(array, DistArray) else array)


def indices(shape, layout, sizes, coords):
    """Return the global indices of each dim that the rank at `coords` holds."""
    held = [np.arange(n) for n in shape]
    for dim, axes in enumerate(layout.dims):
        for axis in axes:
            held[dim] = np.array_split(held[dim], sizes[axis])[coords[axis]]
    return held


def block_of(whole, layout, grid):
    """Return this rank's block of a global NumPy array, ignoring partial axes."""
    return np.asarray(whole[np.ix_(*indices(whole.shape, layout, grid.axes, grid.coords))])


def spread(whole, grid, layout, seed=1):
    """Return `whole` in a layout, its partial sums different on every rank."""
    layout = layout.on(grid.axes, whole.ndim)
    rest = [integers(whole.shape, whole.dtype, seed + i) for i in range(1, grid.extent(layout.partial))]
    index = 0
    for axis in layout.partial:
        index = index * grid.axes[axis] + grid.coords[axis]
    term = rest[index - 1] if index else whole - sum(rest)
    return DistArray(on(grid, block_of(term, layout, grid)), whole.shape, layout, grid)


def represents(array, whole):
    """Return, the same on all ranks, whether the blocks, summed over partial axes, are the blocks of `whole`."""
    return not astray({"": array}, whole)


def astray(arrays, whole):
    """Return the names of the `arrays`, on one grid, that differ from `whole` on any rank."""
    grid = next(iter(arrays.values())).grid
    held = comm.collect((dict(grid.coords), [host(array) for array in arrays.values()]), grid)
    return [
        name
        for i, (name, array) in enumerate(arrays.items())
        if array.shape != whole.shape or not _equal(array, whole, [(at, blocks[i]) for at, blocks in held])
    ]


def _equal(array, whole, held):
    sums = {}
    for coords, block in held:
        place = tuple(at for axis, at in coords.items() if axis not in array.layout.partial)
        index, total = sums.get(place, (indices(array.shape, array.layout, array.grid.axes, coords), 0))
        sums[place] = index, total + block
    return all(np.array_equal(total, whole[np.ix_(*index)]) for index, total in sums.values())


def assemble(array):
    """Return the global array on all ranks, with each block from the first rank that holds it."""
    grid, whole = array.grid, np.zeros(array.shape, backend.numpy_dtype(array.dtype))
    for coords, block in comm.collect((dict(grid.coords), host(array)), grid):
        if _counts(array, coords):
            whole[np.ix_(*indices(array.shape, array.layout, grid.axes, coords))] += block
    return whole


def _counts(array, coords):
    places = {*array.layout.cut, *array.layout.partial}
    return all(at == 0 for axis, at in coords.items() if axis not in places)


def inner(x, y):
    """Return this rank's part of the inner product of the global arrays; x may hold partial sums, y is cut like x."""
    assert y.layout == x.layout.with_partial()
    return np.vdot(host(x), host(y)) if _counts(x, x.grid.coords) else 0


def totals(parts, grid):
    """Return the sums over ranks of a list of numbers."""
    return [sum(numbers) for numbers in zip(*comm.collect(parts, grid), strict=True)]


def lacking(shape, source, target, grid):
    """Return how many elements of this rank's target block are not in its source block, by sets of indices."""
    have, want = (indices(shape, layout, grid.axes, grid.coords) for layout in (source, target))
    common = math.prod(len(set(w) & set(h)) for h, w in zip(have, want, strict=True))
    return math.prod(len(w) for w in want) - common


def refusal(call, grid):
    """Return kind and text of the error that a call raises, the same on all ranks."""
    try:
        call()
        mine = None
    except ColossalError as error:
        mine = type(error), str(error)
    ours = comm.collect(mine, grid)
    assert len(set(ours)) == 1, ours
    assert mine is not None, "no rank raised an error"
    return mine
