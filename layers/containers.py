"""Layers put together: one after the other, side by side, beside what they are added to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from colossal_mpi import ledger
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.layer import Context, Later, Layer


class Watcher(Protocol):
    """What has something to do between the layers of a chain."""

    def visit(self, kind: str, chain: Sequential, i: int) -> None:
        """Take note that layer i goes ``forward`` or ``backward`` or does its ``weight`` products now."""


class Sequential(Layer):
    """Layers one after the other; the backward pass is theirs in reverse."""

    watchers: tuple[Watcher, ...] = ()

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the output of the last layer."""
        caches = []
        for i, layer in enumerate(self.layers):
            self._visit("forward", i)
            with ledger.span("forward", layer=layer.label):
                x, cache = layer.forward(x, ctx)
            caches.append(cache)
        return x, caches

    def replay(self, x: DistArray, ctx: Context) -> Any:
        """Return the caches, without the output of the last layer."""
        *first, last = self.layers
        x, caches = Sequential(*first).forward(x, ctx)
        return [*caches, last.replay(x, ctx)]

    def _visit(self, kind: str, i: int) -> None:
        for watcher in self.watchers:
            watcher.visit(kind, self, i)

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """Let a watcher know of each layer until the context ends."""
        self.watchers += (watcher,)
        try:
            yield
        finally:
            self.watchers = tuple(other for other in self.watchers if other is not watcher)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> Any:
        """Return the cotangent of the first layer's input."""
        for i, layer in reversed(list(enumerate(self.layers))):
            self._visit("backward", i)
            before = len(later or ())
            with ledger.span("backward", layer=layer.label):
                dy = layer.backward(dy, cache[i], later)
            if later is not None:
                later[before:] = [self._measured(i, work) for work in later[before:]]
        return dy

    def _measured(self, i: int, work: Callable[[], None]) -> Callable[[], None]:
        def measured() -> None:
            self._visit("weight", i)
            with ledger.span("weight", layer=self.layers[i].label):
                work()

        return measured


class Parallel(Layer):
    """Layers side by side: the i-th takes the i-th of several arrays."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: Sequence[DistArray], ctx: Context) -> tuple[tuple[DistArray, ...], Any]:
        """Return the outputs of all layers."""
        ys, caches = zip(*[layer.forward(part, ctx) for layer, part in zip(self.layers, x, strict=True)], strict=True)
        return ys, caches

    def backward(self, dy: Sequence[DistArray], cache: Any, later: Later = None) -> Any:
        """Return the cotangents of all inputs."""
        return tuple(
            layer.backward(part, kept, later) for layer, part, kept in zip(self.layers, dy, cache, strict=True)
        )


class Residual(Sequential):
    """``x + chain(x)``, for a chain whose output is shaped as its input."""

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x + chain(x)``."""
        y, cache = super().forward(x, ctx)
        return x + y, (cache, x.layout.with_partial())

    def replay(self, x: DistArray, ctx: Context) -> Any:
        """Return the chain's caches."""
        return super().replay(x, ctx), x.layout.with_partial()

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> Any:
        """Return ``dy`` and the chain's cotangent together."""
        caches, layout = cache
        dy = dy.redistribute(layout)
        return dy + super().backward(dy, caches, later)


class FanOut(Layer):
    """Several layers on one array: a tuple of their outputs, and a tuple of cotangents of them.

    A cotangent may be None, where a loss does not take that output.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)

    def forward(self, x: DistArray, ctx: Context) -> tuple[Any, Any]:
        """Return the outputs of all layers."""
        ys, caches = zip(*[layer.forward(x, ctx) for layer in self.layers], strict=True)
        return ys, caches

    def backward(self, dy: Sequence[DistArray | None], cache: Any, later: Later = None) -> Any:
        """Return the sum of the layers' cotangents.

        Raises
        ------
        ShapeError
            If there are not as many cotangents as layers, or all are None.
        """
        given = sum(part is not None for part in dy)
        if len(dy) != len(self.layers) or not given:
            raise ShapeError(
                f"the cotangents of {len(self.layers)} outputs must be as many, and one of them not None; they are "
                f"{len(dy)}, {given} of them not None"
            )
        taken = [part for part in zip(self.layers, dy, cache, strict=True) if part[1] is not None]
        first, *others = [layer.backward(part, kept, later) for layer, part, kept in taken]
        return sum(others, start=first)
