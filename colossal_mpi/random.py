"""Random arrays whose elements depend on the seed, the name of the stream and the global index alone.

Models draw their initial weights and dropout masks from it; tests and benchmarks draw their arrays. It makes the blocks
of a `DistArray` with NumPy, or masks with the array library of the block.

The generator is Philox4x32-10, a keyed bijection of a 128-bit counter. The counter of an element consists of its row
(the index in all leading dims) and its column. So each rank makes its own block alone, and the global array is bitwise
the same on any grid. Each counter gives two numbers of 64 bits.

References
----------
Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from colossal_mpi.comm import check
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import LayoutError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, box_shape
from colossal_mpi.meta import MetaArray
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _SHIFT = 0xFFFFFFFF, 32
_LANES = 2
_AT_ONCE = 1 << 14
"""The counters of a mask that are made at a time, so that their words stay in the cache of a core."""


def philox(counter: Sequence[Block], key: tuple[int, int], rounds: int = 10) -> list[Block]:
    """Return the four 32-bit words (as uint64) of Philox4x32 for arrays of counters.

    Parameters
    ----------
    counter : sequence of four arrays of uint64
        The words of the counters, each below 2**32, of shapes that broadcast; of any array library.
    key : (int, int)
        The key, two words below 2**32.
    rounds : int
        The number of rounds.

    Returns
    -------
    list of four arrays of uint64
        The words, each below 2**32.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x2 = (second >> _SHIFT) ^ x1, (first >> _SHIFT) ^ x3
        x0 ^= k0
        x2 ^= k1
        second &= _LOW
        first &= _LOW
        x1, x3 = second, first
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return list(backend.namespace(*counter).broadcast_arrays(x0, x1, x2, x3))


def _key(seed: int, stream: str) -> tuple[int, int]:
    """Return the key of a stream, a hash of the seed and its name."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _counters(box: Box, shape: Sequence[int], lanes: int) -> tuple[np.ndarray, np.ndarray, slice]:
    """Return the rows ``[rows, 1]`` and columns ``[1, counters]`` of all counters whose numbers are needed in a box.

    A counter has numbers for `lanes` columns of the array. The slice selects the columns of the box from them.
    """
    rows: np.ndarray = np.zeros((1,), np.uint64)
    for (start, stop), n in zip(box[:-1], shape[:-1], strict=True):
        rows = (rows[:, None] * np.uint64(n) + np.arange(start, stop, dtype=np.uint64)).reshape(-1)
    start, stop = box[-1]
    first = start // lanes
    columns = np.arange(first, -(-stop // lanes), dtype=np.uint64)
    return rows[:, None], columns[None, :], slice(start - first * lanes, stop - first * lanes)


def _counter(rows: Block, columns: Block) -> tuple[Block, Block, Block, Block]:
    """Return the four 32-bit words of counters."""
    return columns & _LOW, columns >> _SHIFT, rows & _LOW, rows >> _SHIFT


def _words(box: Box, shape: Sequence[int], seed: int, stream: str) -> tuple[list[np.ndarray], slice]:
    """Return the two 64-bit numbers of the counters of a box, each ``[rows, counters]``, and the columns to keep."""
    rows, columns, keep = _counters(box, shape, _LANES)
    a, b, c, d = philox(_counter(rows, columns), _key(seed, stream))
    return [(a << _SHIFT) | b, (c << _SHIFT) | d], keep


def _unit(word: np.ndarray) -> np.ndarray:
    """Return 64-bit words as float64 in [0, 1), from 53 bits of each."""
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _interleave(lanes: Sequence[np.ndarray], keep: slice, box: Box) -> np.ndarray:
    """Return the block of a box from the numbers of its counters."""
    rows, counters = lanes[0].shape
    return np.stack(lanes, axis=-1).reshape(rows, counters * _LANES)[:, keep].reshape(box_shape(box))


def uniform_block(box: Box, shape: Sequence[int], seed: int, stream: str) -> np.ndarray:
    """Return the float64 block at `box` of the global array of uniform numbers in [0, 1).

    Parameters
    ----------
    box : Box
        The part of the global array.
    shape : sequence of int
        Global shape.
    seed : int
        The seed.
    stream : str
        The name of the array; arrays of different names are independent.

    Returns
    -------
    array of float64
        The numbers, which depend on their global index and not on the box.
    """
    lanes, keep = _words(box, shape, seed, stream)
    return _interleave([_unit(word) for word in lanes], keep, box)


def uniform_at(rows: np.ndarray, columns: np.ndarray, seed: int, stream: str) -> np.ndarray:
    """Return float64 numbers in [0, 1) at given places of the infinite matrix whose blocks `uniform_block` returns.

    Parameters
    ----------
    rows, columns : arrays of int
        The indices of the places, from 0; of one shape.
    seed : int
        The seed.
    stream : str
        The name of the stream.

    Returns
    -------
    numpy.ndarray
        The numbers, of the shape of `rows`.
    """
    places = np.asarray(columns, np.uint64)
    a, b, c, d = philox(_counter(np.asarray(rows, np.uint64), places // np.uint64(_LANES)), _key(seed, stream))
    return np.where(places % np.uint64(_LANES) == 0, _unit((a << _SHIFT) | b), _unit((c << _SHIFT) | d))


def mask_block(box: Box, shape: Sequence[int], seed: int, stream: str, rate: float, xp: Any = np) -> Block:
    """Return the block at a box of a global bool array whose elements are False with probability `rate`.

    It is the mask of dropout. The rate is rounded to a multiple of 2**-32: each element compares one of the four 32-bit
    words of a counter with a threshold. Seven rounds are enough for a mask (Salmon et al., Table 2).

    Parameters
    ----------
    box : box of int
        The range of each of one or more dims.
    shape : tuple of int
        The global shape. Its first entry is not a bound: a box may lie at later samples.
    seed : int
        The seed.
    stream : str
        The name of the stream.
    rate : float
        The probability of False, from 0 to 1.
    xp : array namespace
        The library that makes the block.

    Returns
    -------
    array of bool
        The block.
    """
    if xp is MetaArray.namespace:
        return xp.empty(box_shape(box), dtype=xp.bool)
    rows, columns, keep = _counters(box, shape, 4)
    rows, columns, key = xp.asarray(rows), xp.asarray(columns), _key(seed, stream)
    count, threshold = columns.shape[1], round(rate * 2**32)
    kept = xp.empty((rows.shape[0], count, 4), dtype=xp.bool)
    step = max(1, _AT_ONCE // max(1, count))
    for first in range(0, rows.shape[0], step):
        batch = slice(first, min(first + step, rows.shape[0]))
        for lane, word in enumerate(philox(_counter(rows[batch, :], columns), key, rounds=7)):
            kept[batch, :, lane] = word >= threshold
    return xp.reshape(xp.reshape(kept, (rows.shape[0], 4 * count))[:, keep], box_shape(box))


def normal_block(box: Box, shape: Sequence[int], seed: int, stream: str) -> np.ndarray:
    """Return the float64 block at `box` of the global array of standard normal numbers (Box-Muller).

    Parameters
    ----------
    box : Box
        The part of the global array.
    shape : sequence of int
        Global shape.
    seed : int
        The seed.
    stream : str
        The name of the array; arrays of different names are independent.

    Returns
    -------
    array of float64
        The numbers, which depend on their global index and not on the box.
    """
    (one, two), keep = _words(box, shape, seed, stream)
    radius = np.sqrt(-2.0 * np.log1p(-_unit(one)))
    angle = 2.0 * np.pi * _unit(two)
    return _interleave([radius * np.cos(angle), radius * np.sin(angle)], keep, box)


def _distributed(
    maker: Callable[[Box, Sequence[int], int, str], np.ndarray],
    shape: Sequence[int],
    grid: Grid,
    layout: Layout,
    seed: int,
    stream: str,
) -> DistArray:
    """Return the array whose blocks a function makes."""
    shape = tuple(shape)
    layout = layout.on(grid.axes, len(shape))
    check.agree(maker.__name__, grid, tuple(grid.axes), shape=shape, layout=layout, seed=seed, stream=stream)
    if math.prod(shape[:-1]) > 2**64:
        raise ShapeError(f"random numbers of shape {shape}: the leading dims may have 2**64 rows together")
    if layout.partial:
        raise LayoutError(f"random numbers in {layout}: make them without partial sums and redistribute")
    if grid.is_meta:
        box = layout.box(shape, grid.axes, grid.coords)
        return DistArray(grid.empty(box_shape(box), "float64"), shape, layout, grid)
    box = layout.box(shape, grid.axes, grid.coords) if shape else ((0, 1),)
    block = maker(box, shape or (1,), seed, stream)
    return DistArray(grid.to_block(block if shape else block[0]), shape, layout, grid)


def uniform(shape: Sequence[int], grid: Grid, layout: Layout, seed: int = 0, stream: str = "") -> DistArray:
    """Return uniform random numbers in [0, 1), bitwise the same global array on every grid and in every layout.

    Parameters
    ----------
    shape : tuple of int
        The global shape.
    grid : Grid
        The ranks.
    layout : Layout
        A layout without partial axes.
    seed : int
        The seed.
    stream : str
        The name of the array: arrays of different names are independent.

    Returns
    -------
    DistArray
        The array, of dtype float64.

    Raises
    ------
    LayoutError
        If `layout` does not fit the shape or the grid, or has partial axes.
    ShapeError
        If the leading dims have more than 2**64 rows together.

    Notes
    -----
    **Communication:** none.

    Examples
    --------
    >>> A = random.uniform((4096, 1024), grid, Layout("row", "col"), stream="A")
    """
    return _distributed(uniform_block, shape, grid, layout, seed, stream)


def normal(shape: Sequence[int], grid: Grid, layout: Layout, seed: int = 0, stream: str = "") -> DistArray:
    """Return standard normal random numbers, bitwise the same global array on every grid and in every layout.

    Parameters
    ----------
    shape : tuple of int
        The global shape.
    grid : Grid
        The ranks.
    layout : Layout
        A layout without partial axes.
    seed : int
        The seed.
    stream : str
        The name of the array: arrays of different names are independent.

    Returns
    -------
    DistArray
        The array, of dtype float64.

    Raises
    ------
    LayoutError
        If `layout` does not fit the shape or the grid, or has partial axes.
    ShapeError
        If the leading dims have more than 2**64 rows together.

    Notes
    -----
    **Communication:** none.

    Examples
    --------
    >>> A = random.normal((4096, 1024), grid, Layout("row", "col"), stream="A")
    """
    return _distributed(normal_block, shape, grid, layout, seed, stream)
