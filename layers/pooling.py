"""One vector for a sequence, by its mean or its first position, and its classes; one value for a window of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.conv import Pair, pair
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import rounded
from colossal_mpi.layout import Layout, box_shape
from colossal_mpi.platform import backend


def _zeros(dy: DistArray, shape: tuple[int, ...], layout: Layout) -> DistArray:
    box = layout.box(shape, dy.grid.axes, dy.grid.coords)
    return DistArray(backend.zeros_like(dy.local, box_shape(box)), shape, layout, dy.grid)


class MeanPool(Layer):
    """The mean over the positions of the stream, ``[b, s, h]`` to ``[b, h]``.

    **Communication:** partial sums ``[b, h]`` over the axes that cut s are reduced. Backward: dy is gathered to x.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.y = parallelism.stream("bh")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the mean of the positions."""
        return rounded((x.sum_over([1]) / x.shape[1]).redistribute(self.y), x.dtype), (x.shape, x.layout.with_partial())

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return ``dy / s`` at every position."""
        shape, layout = cache
        dy = dy.redistribute(Layout(layout.dims[0], layout.dims[2])) / shape[1]
        dx = _zeros(dy, shape, layout)
        dx.local[...] = dy.local[:, None, :]
        return dx


class FirstPool(Layer):
    """The first position of the stream, a class token as a rule, ``[b, s, h]`` to ``[b, h]``.

    **Communication:** the rows of position 0 go to the ranks that hold others. Backward: none.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.y = parallelism.stream("bh")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return position 0."""
        at = 0 if ctx.order is None else int(np.argmin(ctx.order))
        return x[:, at, :].redistribute(self.y), (x.shape, x.layout.with_partial(), at)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy` at position 0 and zeros elsewhere."""
        shape, layout, at = cache
        dy = dy.redistribute(Layout(layout.dims[0], layout.dims[2]))
        dx = _zeros(dy, shape, layout)
        start, stop = dx.box[1]
        if start <= at < stop:
            dx.local[:, at - start, :] = dy.local
        return dx


class ClassifierHead(Sequential):
    """A pooled stream ``[b, h]`` to logits ``[b, v]`` of v classes, cut as a vocabulary is.

    Parameters
    ----------
    hidden, classes : int
    parallelism : Parallelism
    name : str
    pool : {"first", "mean"}
    **common
        ``std``, ``seed`` and ``dtype``, as `Linear` takes them.

    Raises
    ------
    OptionError
        If there is no such pooling.
    """

    def __init__(
        self, hidden: int, classes: int, parallelism: Parallelism, name: str, *, pool: str = "first", **common: Any
    ) -> None:
        pooling = {"first": FirstPool, "mean": MeanPool}
        if pool not in pooling:
            raise OptionError(f"{name}: pool={pool!r}: use 'first' or 'mean'")
        super().__init__(
            pooling[pool](parallelism),
            Linear("bh,hv->bv", {"h": hidden, "v": classes}, "v", parallelism, name, replicate="s", **common),
        )


class Pool2d(Layer):
    """Base of the layers that make one value of each window of images ``[b, c, y, x]``, cut over b and c at most.

    Parameters
    ----------
    kernel : int or pair of int
        Along y and x.
    stride : int or pair of int, optional
        That of the kernel by default.
    padding : int or pair of int
        On both sides; half of the kernel at most.

    Raises
    ------
    OptionError
        If a size is out of its range.
    ShapeError
        From `forward`, if the images are smaller than the kernel.

    Notes
    -----
    **Communication:** none, if neither y nor x is cut and there are no partial sums.
    """

    def __init__(self, kernel: int | Pair, *, stride: int | Pair | None = None, padding: int | Pair = 0) -> None:
        self.kernel, self.padding = pair(kernel), pair(padding)
        self.stride = self.kernel if stride is None else pair(stride)
        fits = all(0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))
        if min(*self.kernel, *self.stride) < 1 or not fits:
            raise OptionError(
                f"{type(self).__name__}: kernel {self.kernel}, stride {self.stride}, padding {self.padding}: kernel "
                "and stride must be 1 or more and padding from 0 to half of the kernel"
            )

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the values ``[b, c, i, j]`` of the windows, row by row."""
        sizes = self.kernel, self.stride, self.padding
        if x.ndim != 4 or min(kernels.windows((x.shape[2], x.shape[3]), *sizes)) < 1:
            raise ShapeError(
                f"{type(self).__name__} of images {x.shape}: they must be [b, c, y, x], with their padding "
                f"{self.padding} no smaller than the kernel {self.kernel}"
            )
        image = x.redistribute(Layout(*x.layout.dims[:2], None, None))
        block, kept = self._pool(image, *sizes)
        y = DistArray(block, (*x.shape[:2], *block.shape[2:]), image.layout, x.grid)
        return y, (kept, x.shape, image.layout, x.layout.with_partial())

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of the images."""
        kept, shape, cut, layout = cache
        dy = dy.redistribute(cut)
        block = self._unpool(dy, kept, (shape[2], shape[3]), self.kernel, self.stride, self.padding)
        return DistArray(block, shape, cut, dy.grid).redistribute(layout)

    def _pool(self, x: DistArray, *sizes: Pair) -> tuple[Any, Any]:
        """Return the values of a block and what `_unpool` needs."""
        raise NotImplementedError

    def _unpool(self, dy: DistArray, kept: Any, size: Pair, *sizes: Pair) -> Any:
        raise NotImplementedError


class MaxPool2d(Pool2d):
    """The greatest element of each window, the first of equal ones; parameters are those of `Pool2d`."""

    def _pool(self, x: DistArray, *sizes: Pair) -> tuple[Any, Any]:
        y, which = kernels.of(x.grid).max_pool(x.local, *sizes)
        return y, which

    def _unpool(self, dy: DistArray, kept: Any, size: Pair, *sizes: Pair) -> Any:
        return kernels.of(dy.grid).max_pool_backward(dy.local, kept, size, *sizes)


class AvgPool2d(Pool2d):
    """The mean of each window, zeros of the padding included; parameters are those of `Pool2d`."""

    def _pool(self, x: DistArray, *sizes: Pair) -> tuple[Any, Any]:
        return kernels.of(x.grid).mean_pool(x.local, *sizes), None

    def _unpool(self, dy: DistArray, kept: Any, size: Pair, *sizes: Pair) -> Any:
        return kernels.of(dy.grid).mean_pool_backward(dy.local, size, *sizes)
