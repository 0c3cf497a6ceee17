"""One vector for a sequence: the mean of its positions or the first of them, and the classes of it."""

from __future__ import annotations

from typing import Any

from colossal_mpi import backend
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.layer import Chain, Context, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout


class MeanPool(Layer):
    """The mean over the positions of the stream, ``[b, s, h]`` to ``[b, h]``.

    **Communication:** partial sums ``[b, h]`` over the axes that cut s are reduced. Backward: dy is gathered to x.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.y = parallelism.stream("bh")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the mean of the positions."""
        return (x.sum_over([1]) / x.shape[1]).redistribute(self.y), x

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return ``dy / s`` at every position."""
        layout = cache.layout
        dy = dy.redistribute(Layout(layout.dims[0], layout.dims[2])) / cache.shape[1]
        return cache.like(backend.zeros_like(dy.local, cache.local.shape) + dy.local[:, None, :])


class FirstPool(Layer):
    """The first position of the stream, a class token as a rule, ``[b, s, h]`` to ``[b, h]``.

    **Communication:** the rows of position 0 go to the ranks that hold others. Backward: none.
    """

    def __init__(self, parallelism: Parallelism) -> None:
        self.y = parallelism.stream("bh")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return position 0."""
        return x[:, 0, :].redistribute(self.y), x

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy` at position 0 and zeros elsewhere."""
        layout, (start, stop) = cache.layout, cache.box[1]
        dy = dy.redistribute(Layout(layout.dims[0], layout.dims[2]))
        block = backend.zeros_like(dy.local, cache.local.shape)
        if start == 0 < stop:
            block[:, 0, :] = dy.local
        return cache.like(block)


class ClassifierHead(Chain):
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
            Linear("bh,hv->bv", {"h": hidden, "v": classes}, "v", parallelism, name, **common),
        )
