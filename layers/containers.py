"""Containers of layers: they run layers in sequence, in parallel, on one input, or with a residual connection.

Models and blocks are containers. Pipelines cut a `Sequential` into stages, and `colossal_mpi.layers.overlap` watches it
to prefetch weights and to start reductions of gradients between its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from colossal_mpi import ledger
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Arrays, Cache, Later, Layer


class Watcher(Protocol):
    """An observer that a `Sequential` calls before each of its layers."""

    def visit(self, kind: str, chain: Sequential, i: int) -> None:
        """Act before layer i runs its ``forward`` pass, its ``backward`` pass or its ``weight`` products."""


class Sequential(Layer):
    """Layers one after the other.

    Parameters
    ----------
    *layers : Layer
        The layers in the order of the forward pass; the backward pass goes through them in reverse. Each layer must
        return the arrays that the next one takes.

    Notes
    -----
    **Communication:** the collectives of the layers. The ledger records the time, words and flop of each layer under
    its label in its spans ``forward``, ``backward`` and ``weight``.

    **Adjoint:** the reversed sequence of the layers' backward passes.
    """

    watchers: tuple[Watcher, ...] = ()

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: Arrays, ctx: Context) -> tuple[Arrays, Cache]:
        caches = []
        for i, layer in enumerate(self.layers):
            self._visit("forward", i)
            with ledger.span("forward", layer=layer.label):
                x, cache = layer.forward(x, ctx)
            caches.append(cache)
        return x, caches

    def replay(self, x: Arrays, ctx: Context) -> Cache:
        # Only the last layer may leave out what its output alone needs.
        *first, last = self.layers
        x, caches = Sequential(*first).forward(x, ctx)
        return [*caches, last.replay(x, ctx)]

    def _visit(self, kind: str, i: int) -> None:
        for watcher in self.watchers:
            watcher.visit(kind, self, i)

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Return a context in which a watcher is called before each layer.

        Parameters
        ----------
        watcher : Watcher
            The observer.

        Yields
        ------
        None
            Nothing.
        """
        self.watchers += (watcher,)
        try:
            yield
        finally:
            self.watchers = tuple(other for other in self.watchers if other is not watcher)

    def backward(self, dy: Arrays, cache: Cache, later: Later = None) -> Arrays:
        for i, layer in reversed(list(enumerate(self.layers))):
            self._visit("backward", i)
            before = len(later or ())
            with ledger.span("backward", layer=layer.label):
                dy = layer.backward(dy, cache[i], later)
            if later is not None:
                later[before:] = [self._recorded(i, work) for work in later[before:]]
        return dy

    def _recorded(self, i: int, work: Callable[[], None]) -> Callable[[], None]:
        """Return a weight product that is watched and recorded under the label of layer i."""

        def recorded() -> None:
            self._visit("weight", i)
            with ledger.span("weight", layer=self.layers[i].label):
                work()

        return recorded


class Parallel(Layer):
    """Layers side by side: the i-th layer takes the i-th array of a tuple.

    Parameters
    ----------
    *layers : Layer
        One layer for each array of the input. The output is the tuple of their outputs.

    Notes
    -----
    **Communication:** the collectives of the layers.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: Sequence[DistArray], ctx: Context) -> tuple[tuple[DistArray, ...], Cache]:
        ys, caches = zip(*[layer.forward(part, ctx) for layer, part in zip(self.layers, x, strict=True)], strict=True)
        return ys, caches

    def backward(self, dy: Sequence[DistArray], cache: Cache, later: Later = None) -> tuple[DistArray, ...]:
        return tuple(
            layer.backward(part, part_cache, later)
            for layer, part, part_cache in zip(self.layers, dy, cache, strict=True)
        )


class Residual(Sequential):
    """A sequence of layers with a residual connection, ``y = x + layers(x)``.

    Parameters
    ----------
    *layers : Layer
        The layers of the branch, whose output has the shape of their input.

    Notes
    -----
    **Communication:** the collectives of the layers.

    **Adjoint:** ``dx = dy + layers^T(dy)``.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        y, cache = super().forward(x, ctx)
        return x + y, (cache, x.layout.with_partial())

    def replay(self, x: DistArray, ctx: Context) -> Cache:
        return super().replay(x, ctx), x.layout.with_partial()

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        caches, layout = cache
        # dY -> dY in the layout of X, without partial sums
        dy = dy.redistribute(layout)
        through: DistArray = super().backward(dy, caches, later)
        return dy + through


class FanOut(Layer):
    """Several layers on one array: the output is the tuple of their outputs.

    Parameters
    ----------
    *layers : Layer
        The layers, each of which takes the input. A cotangent of their outputs may be None, where the loss does not
        depend on that output.

    Raises
    ------
    ShapeError
        From `backward`, if there are not as many cotangents as layers, or all are None.

    Notes
    -----
    **Communication:** the collectives of the layers.

    **Adjoint:** the sum of the layers' cotangents.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: DistArray, ctx: Context) -> tuple[tuple[Arrays, ...], Cache]:
        ys, caches = zip(*[layer.forward(x, ctx) for layer in self.layers], strict=True)
        return ys, caches

    def backward(self, dy: Sequence[DistArray | None], cache: Cache, later: Later = None) -> DistArray:
        given = sum(part is not None for part in dy)
        if len(dy) != len(self.layers) or not given:
            raise ShapeError(
                f"the cotangents of {len(self.layers)} outputs must be as many, and one of them not None; they are "
                f"{len(dy)}, {given} of them not None"
            )
        used = [part for part in zip(self.layers, dy, cache, strict=True) if part[1] is not None]
        first, *others = [layer.backward(part, part_cache, later) for layer, part, part_cache in used]
        total: DistArray = sum(others, start=first)
        return total
