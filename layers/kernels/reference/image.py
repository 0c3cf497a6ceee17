"""The windows of images, as a product takes them."""

from __future__ import annotations

from collections.abc import Iterator

from colossal_mpi.backend import Block, namespace

Pair = tuple[int, int]


def windows(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Return how many windows there are along y and x; none or fewer where the kernel is larger than the image."""
    ny, nx = ((n + 2 * p - k) // t + 1 for n, k, t, p in zip(size, kernel, stride, padding, strict=True))
    return ny, nx


def unfold(x: Block, kernel: Pair, stride: Pair, padding: Pair) -> Block:
    """Return the windows ``[b, c, i, j, s]`` of images ``[b, c, y, x]`` between zeros, s counting them row by row."""
    xp, count = namespace(x), windows(x.shape[2:], kernel, stride, padding)
    padded = _padded(x, padding)
    inner = _inner(x, padding)
    padded[inner] = x
    out = xp.empty((*x.shape[:2], *kernel, *count), dtype=x.dtype)
    for i, j, rows, columns in _places(kernel, stride, count):
        out[:, :, i, j, :, :] = padded[:, :, rows, columns]
    return xp.reshape(out, (*x.shape[:2], *kernel, count[0] * count[1]))


def fold(windows_of: Block, size: Pair, stride: Pair, padding: Pair) -> Block:
    """Return the images of which each element is the sum of all that `unfold` made of it: its adjoint."""
    xp, (b, c, ky, kx) = namespace(windows_of), windows_of.shape[:4]
    count = windows(size, (ky, kx), stride, padding)
    parts = xp.reshape(windows_of, (b, c, ky, kx, *count))
    image = xp.zeros((b, c, *size), dtype=windows_of.dtype)
    padded = _padded(image, padding)
    for i, j, rows, columns in _places((ky, kx), stride, count):
        padded[:, :, rows, columns] += parts[:, :, i, j, :, :]
    image[...] = padded[_inner(image, padding)]
    return image


def _padded(x: Block, padding: Pair) -> Block:
    (b, c, ny, nx), (py, px) = x.shape, padding
    return namespace(x).zeros((b, c, ny + 2 * py, nx + 2 * px), dtype=x.dtype)


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
