"""Windows of images, as a convolution's product takes them, and pooling of windows; both layers call it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import repeat

from colossal_mpi.layers.kernels.reference.wide import in_wide
from colossal_mpi.platform.backend import Block, namespace

Pair = tuple[int, int]


def windows(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Return the number of windows along y and x. It is below 1 if the kernel is larger than the padded image.

    Parameters
    ----------
    size : pair of int
        Height and width of the image.
    kernel : pair of int
        Height and width of a window.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    pair of int
        Numbers of windows along y and x.
    """
    ny, nx = ((n + 2 * p - k) // t + 1 for n, k, t, p in zip(size, kernel, stride, padding, strict=True))
    return ny, nx


def unfold(x: Block, kernel: Pair, stride: Pair, padding: Pair) -> Block:
    """Return the windows of images that are padded with zeros.

    Parameters
    ----------
    x : array
        Images ``[b, c, y, x]``.
    kernel : pair of int
        Height and width of a window.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    array
        Windows ``[b, c, i, j, s]``, where s counts them row by row. **Adjoint:** `fold`.
    """
    xp, count = namespace(x), windows(x.shape[2:], kernel, stride, padding)
    padded = _padded(x, padding)
    inner = _inner(x, padding)
    padded[inner] = x
    out = xp.empty((*x.shape[:2], *kernel, *count), dtype=x.dtype)
    for i, j, rows, columns in _places(kernel, stride, count):
        out[:, :, i, j, :, :] = padded[:, :, rows, columns]
    return xp.reshape(out, (*x.shape[:2], *kernel, count[0] * count[1]))


@in_wide
def fold(windows_of: Block, size: Pair, stride: Pair, padding: Pair) -> Block:
    """Return images whose elements are the sums of their copies in all windows.

    Parameters
    ----------
    windows_of : array
        Windows ``[b, c, i, j, s]`` as `unfold` returns them.
    size : pair of int
        Height and width of the images.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    array
        Images ``[b, c, y, x]``. **Adjoint:** `unfold`.
    """
    b, c, ky, kx = windows_of.shape[:4]
    count = windows(size, (ky, kx), stride, padding)
    parts = namespace(windows_of).reshape(windows_of, (b, c, ky * kx, *count))
    return _added((parts[:, :, n, :, :] for n in range(ky * kx)), parts, size, (ky, kx), stride, padding)


def _added(parts: Iterable[Block], like: Block, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Block:
    """Return images to which the elements ``[b, c, i, j]`` of all windows are added at their places."""
    xp = namespace(like)
    image = xp.zeros((*like.shape[:2], *size), dtype=like.dtype)
    padded, count = _padded(image, padding), windows(size, kernel, stride, padding)
    for part, (_, _, rows, columns) in zip(parts, _places(kernel, stride, count), strict=True):
        padded[:, :, rows, columns] += part
    image[...] = padded[_inner(image, padding)]
    return image


def max_pool(x: Block, kernel: Pair, stride: Pair, padding: Pair) -> tuple[Block, Block]:
    """Return the greatest element of each window, and its number in the window.

    Parameters
    ----------
    x : array
        Images ``[b, c, y, x]``.
    kernel : pair of int
        Height and width of a window.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    best : array
        Greatest elements ``[b, c, i, j]``. NaN is greater than any number, and padding is smaller.
    which : array
        Their numbers in the window in int32, row by row; of equal elements the first.
    """
    xp, count = namespace(x), windows(x.shape[2:], kernel, stride, padding)
    padded = _padded(x, padding, -math.inf)
    padded[_inner(x, padding)] = x
    best = xp.full((*x.shape[:2], *count), -math.inf, dtype=x.dtype)
    which = xp.zeros(best.shape, dtype=xp.int32)
    for number, (_, _, rows, columns) in enumerate(_places(kernel, stride, count)):
        other = padded[:, :, rows, columns]
        better = (other > best) | xp.isnan(other)
        best = xp.where(better, other, best)
        which = xp.where(better, xp.asarray(number, dtype=which.dtype), which)
    return best, which


@in_wide
def max_pool_backward(dy: Block, which: Block, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Block:
    """Return the cotangent of the images of `max_pool`.

    Parameters
    ----------
    dy : array
        Cotangent ``[b, c, i, j]`` of the greatest elements.
    which : array
        Numbers in the window, as `max_pool` returned them.
    size : pair of int
        Height and width of the images.
    kernel : pair of int
        Height and width of a window.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    array
        Cotangent ``[b, c, y, x]``: `dy` at the greatest elements, zeros elsewhere.
    """
    xp, numbers = namespace(dy), range(kernel[0] * kernel[1])
    parts = (dy * xp.astype(which == number, dy.dtype) for number in numbers)
    return _added(parts, dy, size, kernel, stride, padding)


@in_wide
def mean_pool(x: Block, kernel: Pair, stride: Pair, padding: Pair) -> Block:
    """Return the mean of each window. Zeros of the padding count.

    Parameters
    ----------
    x : array
        Images ``[b, c, y, x]``.
    kernel : pair of int
        Height and width of a window.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    array
        Means ``[b, c, i, j]``.
    """
    count, padded = windows(x.shape[2:], kernel, stride, padding), _padded(x, padding)
    padded[_inner(x, padding)] = x
    y = namespace(x).zeros((*x.shape[:2], *count), dtype=x.dtype)
    for _, _, rows, columns in _places(kernel, stride, count):
        y += padded[:, :, rows, columns]
    y /= kernel[0] * kernel[1]
    return y


@in_wide
def mean_pool_backward(dy: Block, size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Block:
    """Return the cotangent of the images of `mean_pool`.

    Parameters
    ----------
    dy : array
        Cotangent ``[b, c, i, j]`` of the means.
    size : pair of int
        Height and width of the images.
    kernel : pair of int
        Height and width of a window.
    stride : pair of int
        Distance of windows along y and x.
    padding : pair of int
        Padding on both sides along y and x.

    Returns
    -------
    array
        Cotangent ``[b, c, y, x]``.
    """
    area = kernel[0] * kernel[1]
    return _added(repeat(dy / area, area), dy, size, kernel, stride, padding)


def _padded(x: Block, padding: Pair, fill: float = 0.0) -> Block:
    """Return an array with room for `x` between its padding, filled."""
    (b, c, ny, nx), (py, px) = x.shape, padding
    return namespace(x).full((b, c, ny + 2 * py, nx + 2 * px), fill, dtype=x.dtype)


def _inner(x: Block, padding: Pair) -> tuple[slice, ...]:
    rows, columns = (slice(p, p + n) for p, n in zip(padding, x.shape[2:], strict=True))
    return slice(None), slice(None), rows, columns


def _places(kernel: Pair, stride: Pair, count: Pair) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield each element of the kernel and the rows and columns of the padded image that it meets."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows, columns = (
                slice(first, first + t * (n - 1) + 1, t) for first, t, n in zip((i, j), stride, count, strict=True)
            )
            yield i, j, rows, columns
