"""Pooling: one vector for a sequence, one value for a window of an image, and the classifier on a pooled stream.

Vision and text classifiers end with them. They call the pooling kernels of the grid and `redistribute`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.conv import Pair, pair
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import rounded
from colossal_mpi.layout import Layout, box_shape
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def _zeros(dy: DistArray, shape: tuple[int, ...], layout: Layout) -> DistArray:
    """Return zeros of a global shape in a layout, with dtype, device and grid of dy."""
    box = layout.box(shape, dy.grid.axes, dy.grid.coords)
    return DistArray(backend.zeros_like(dy.local, box_shape(box)), shape, layout, dy.grid)


class MeanPool(Layer):
    """The mean over the positions of the stream, ``[b, s, h]`` to ``[b, h]``.

    Parameters
    ----------
    parallelism : Parallelism
        The mode, which chooses the layout of the result.

    Notes
    -----
    **Communication:** the partial sums ``[b, h]`` are reduced over the axes that cut s; backward dy is gathered to the
    layout of x.

    **Adjoint:** ``dy / s`` at every position.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.y = parallelism.stream("bh")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        # X[B_row, S_col, H] summed over s -> Y[B_row, H] {U_col} -> Y[B_row, H]: allreduce over col
        y = (x.sum_over([1]) / x.shape[1]).redistribute(self.y)
        return rounded(y, x.dtype), (x.shape, x.layout.with_partial())

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        shape, layout = cache
        # dY[B_row, H] / s -> dX[B_row, S_col, H]: the same vector at every position
        dy = dy.redistribute(Layout(layout.dims[0], layout.dims[2])) / shape[1]
        dx = _zeros(dy, shape, layout)
        dx.local[...] = dy.local[:, None, :]
        return dx


class FirstPool(Layer):
    """The first position of the stream, as a rule a class token, ``[b, s, h]`` to ``[b, h]``.

    Parameters
    ----------
    parallelism : Parallelism
        The mode, which chooses the layout of the result.

    Notes
    -----
    In another order of the sequence (`Context.order`) it takes the token that is the first of the sequence.

    **Communication:** the ranks that hold position 0 send it to the ranks that hold other positions; backward none.

    **Adjoint:** dy at position 0, zeros elsewhere.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.y = parallelism.stream("bh")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        at = 0 if ctx.order is None else int(np.argmin(ctx.order))
        # X[B_row, S_col, H] at one s -> Y[B_row, H]: a broadcast over col
        return x[:, at, :].redistribute(self.y), (x.shape, x.layout.with_partial(), at)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        shape, layout, at = cache
        # dY[B_row, H] -> dX[B_row, S_col, H]: zeros but on the ranks that hold the position
        dy = dy.redistribute(Layout(layout.dims[0], layout.dims[2]))
        dx = _zeros(dy, shape, layout)
        start, stop = dx.box[1]
        if start <= at < stop:
            dx.local[:, at - start, :] = dy.local
        return dx


class ClassifierHead(Sequential):
    """The head of a classifier, which pools the stream ``[b, s, h]`` and maps ``[b, h]`` to logits ``[b, v]``.

    Parameters
    ----------
    hidden : int
        Width h of the stream.
    classes : int
        Number v of classes, which are cut like a vocabulary.
    parallelism : Parallelism
        The mode, which chooses maps and layouts.
    name : str
        Prefix of the names of the parameters ``weight`` ``[h, v]`` and ``bias`` ``[v]``.
    pool : {"first", "mean"}
        Whether the first position is taken, or the mean of all.
    bias : bool
        Whether the product has a bias.
    std : float
        Standard deviation of the initial weight.
    seed : int, optional
        Seed of the initial weight; None leaves it zero, for a weight that is to be loaded.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If there is no such pooling.

    Notes
    -----
    **Communication:** the collectives of the pooling and of the product. Ranks that cut the sequence all do the same
    product.
    """

    def __init__(
        self,
        hidden: int,
        classes: int,
        parallelism: Parallelism,
        name: str,
        *,
        pool: str = "first",
        bias: bool = True,
        std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        pooling = {"first": FirstPool, "mean": MeanPool}
        if pool not in pooling:
            raise OptionError(f"{name}: pool={pool!r}: use 'first' or 'mean'")
        sizes = {"h": hidden, "v": classes}
        initial: dict[str, Any] = {"bias": bias, "std": std, "seed": seed, "dtype": dtype}
        super().__init__(
            pooling[pool](parallelism),
            Linear("bh,hv->bv", sizes, "v", parallelism, name, replicate="s", **initial),
        )


class Pool2d(Layer):
    """Base of the layers that make one value of each window of images ``[b, c, y, x]``.

    The output ``[b, c, i, j]`` has the values of the windows row by row. Images may be cut over b and c; an image that
    is cut over y or x is gathered. Parameters, errors and words are documented at `MaxPool2d` and `AvgPool2d`.
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

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        sizes = self.kernel, self.stride, self.padding
        if x.ndim != 4 or min(kernels.windows((x.shape[2], x.shape[3]), *sizes)) < 1:
            raise ShapeError(
                f"{type(self).__name__} of images {x.shape}: they must be [b, c, y, x], with their padding "
                f"{self.padding} no smaller than the kernel {self.kernel}"
            )
        # X[B_row, C_col, Y, X] -> Y[B_row, C_col, I, J]; images that are cut over y or x are gathered first
        image = x.redistribute(Layout(*x.layout.dims[:2], None, None))
        block, saved = self._pool(image, *sizes)
        y = DistArray(block, (*x.shape[:2], *block.shape[2:]), image.layout, x.grid)
        return y, (saved, x.shape, image.layout, x.layout.with_partial())

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        saved, shape, cut, layout = cache
        # dY[B_row, C_col, I, J] -> dX[B_row, C_col, Y, X]: overlapping windows are added
        dy = dy.redistribute(cut)
        block = self._unpool(dy, saved, (shape[2], shape[3]), self.kernel, self.stride, self.padding)
        return DistArray(block, shape, cut, dy.grid).redistribute(layout)

    def _pool(self, x: DistArray, *sizes: Pair) -> tuple[Block, Block | None]:
        """Return the values of this rank's windows and what `_unpool` needs."""
        raise NotImplementedError

    def _unpool(self, dy: DistArray, saved: Block | None, size: Pair, *sizes: Pair) -> Block:
        """Return the cotangent of this rank's images, whose size along y and x is given."""
        raise NotImplementedError


class MaxPool2d(Pool2d):
    """The greatest element of each window of images ``[b, c, y, x]``, and of equal ones the first.

    Parameters
    ----------
    kernel : int or pair of int
        Sides of a window along y and x, in pixels.
    stride : int or pair of int, optional
        Distance of two windows along y and x, in pixels; by default the kernel.
    padding : int or pair of int
        Rows and columns that are added on both sides, in pixels: at most half of the kernel.

    Raises
    ------
    OptionError
        If a size is out of its range.
    ShapeError
        From `forward`, if the images are smaller than the kernel.

    Notes
    -----
    **Communication:** none if neither y nor x is cut and there are no partial sums.

    **Adjoint:** dy at the place of the greatest element.
    """

    def _pool(self, x: DistArray, *sizes: Pair) -> tuple[Block, Block | None]:
        y, which = kernels.of(x.grid).max_pool(x.local, *sizes)
        return y, which

    def _unpool(self, dy: DistArray, saved: Block | None, size: Pair, *sizes: Pair) -> Block:
        return kernels.of(dy.grid).max_pool_backward(dy.local, saved, size, *sizes)


class AvgPool2d(Pool2d):
    """The mean of each window of images ``[b, c, y, x]``, with the zeros of the padding.

    Parameters
    ----------
    kernel : int or pair of int
        Sides of a window along y and x, in pixels.
    stride : int or pair of int, optional
        Distance of two windows along y and x, in pixels; by default the kernel.
    padding : int or pair of int
        Rows and columns of zeros on both sides, in pixels: at most half of the kernel.

    Raises
    ------
    OptionError
        If a size is out of its range.
    ShapeError
        From `forward`, if the images are smaller than the kernel.

    Notes
    -----
    **Communication:** none if neither y nor x is cut and there are no partial sums.

    **Adjoint:** ``dy / (i j)`` at every element of a window of i x j.
    """

    def _pool(self, x: DistArray, *sizes: Pair) -> tuple[Block, Block | None]:
        return kernels.of(x.grid).mean_pool(x.local, *sizes), None

    def _unpool(self, dy: DistArray, saved: Block | None, size: Pair, *sizes: Pair) -> Block:
        return kernels.of(dy.grid).mean_pool_backward(dy.local, size, *sizes)
