"""What a layer is: a pure forward that returns its cache, and a manual backward that takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, Protocol

from colossal_mpi import backend, distarray, ledger, random
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import require_dtype, rounded, widened
from colossal_mpi.layout import Layout

Later = list[Callable[[], None]] | None
"""Where a backward pass puts its weight products for later; None does them at once."""


@dataclass(frozen=True)
class Context:
    """What a layer may know of the step that it is part of."""

    step: int = 0
    microbatch: int = 0
    sample: int = 0
    """Global index, in the step, of the microbatch's first sample: dropout masks are the same for any microbatches."""
    train: bool = True
    mask: DistArray | None = None
    """Bool ``[b, s]`` in the layout of `Parallelism.tokens`, true where a token is no padding; None: all are tokens."""
    positions: Any = None
    """Integers ``[s]`` or ``[b, s]``, a DistArray or the whole array on every rank; None: the indices in the sequence.
    A causal order is one of positions."""
    order: Any = None
    """Integers ``[s]``, on every rank in NumPy: of each index of the arrays the index of its token in the sequence, as
    `Parallelism.order` gives them; None: the same."""
    segments: DistArray | None = None
    """Integers ``[b, s]`` in that layout: the segment of each token, such as its sentence of two; None: all are 0."""
    share: float = 1.0
    """Factor of the losses that layers add of their own: the microbatch's share of the step."""
    scale: float = 1.0
    """Factor of all cotangents, that of the loss included: the loss scale of 16-bit floats."""
    losses: dict[str, float] | None = None
    """Where layers report those losses, times `share`, by name; None: they do not."""


class Reduction(Protocol):
    """A reduction that gradients are part of, under way or yet to be begun: `layers.buckets.Bucket`."""

    def finish(self) -> None:
        """Wait for it and add its results to the gradients of the parameters."""


class Buckets(Protocol):
    """What takes contributions to gradients while a step is under way: `layers.buckets.GradientBuckets`."""

    def counted(self, parameter: Parameter) -> None:
        """Take note of a contribution to a gradient that stays partial until the last."""

    def contribute(self, parameter: Parameter, gradient: DistArray) -> None:
        """Take a contribution to a gradient of which each is reduced."""


class Ahead(Protocol):
    """What gathers weights before they are used: `layers.prefetch.Prefetch`."""

    def take(self, parameter: Parameter, layout: Layout) -> DistArray:
        """Return a weight in the layout of its use."""


class Watcher(Protocol):
    """What has something to do between the layers of a chain."""

    def visit(self, kind: str, chain: Chain, i: int) -> None:
        """Take note that layer i goes ``forward`` or ``backward`` or does its ``weight`` products now."""


class Parameter:
    """A weight: stored cut as far as the mode allows, with its gradient in the same layout.

    Parameters
    ----------
    name : str
        Its full name, unique in the model: the stream of its random numbers and its key in checkpoints.
    shape : tuple of int
        Global shape.
    used : Layout
        How its layer uses it.
    parallelism : Parallelism
    std : float, optional
        Standard deviation of the normal initial values.
    fill : float
        The initial value where `std` is None.
    seed : int, optional
        None makes zeros of random values, for weights that are to be loaded.
    dtype : optional
    inputs : int
        How many of the leading dims are those of the layer's input, for optimizers that take weights as matrices.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        used: Layout,
        parallelism: Parallelism,
        *,
        std: float | None = None,
        fill: float = 0.0,
        seed: int | None = 0,
        dtype: Any = "float32",
        inputs: int = 1,
    ) -> None:
        self.name, self.shape, self.parallelism, self.inputs = name, tuple(shape), parallelism, inputs
        self.deferred = parallelism.deferred
        layout, grid = parallelism.store(used, shape), parallelism.grid
        self.owned = parallelism.own(layout, shape).on(grid.axes, len(shape))
        """The layout of the reduced gradient and of the optimizer's state."""
        self.grad: DistArray | None = None
        self.world: Grid | None = None
        """The ranks of the whole model, where it is cut into stages; None: those of the parameter's own grid."""
        self.counted = True
        """False for a copy, on another stage, of a weight that has its place on one before."""
        self._dtype = require_dtype(dtype)
        self._value: DistArray | None = None
        self.buckets: Buckets | None = None
        self.coming: list[Reduction] = []
        """Reductions that hold parts of the gradient; `reduce` waits for them."""
        self.prefetch: Ahead | None = None

        def make(layout: Layout, dtype: str) -> DistArray:
            if std is None or seed is None:
                return distarray.full(shape, fill, grid, layout, dtype)
            return (random.normal(shape, grid, layout, seed, name) * std).astype(dtype)

        self._make, self._stored = make, layout

    @property
    def dtype(self) -> str:
        """The name of the weight's dtype."""
        return self._dtype if self._value is None else backend.numpy_dtype(self._value.dtype).name

    @property
    def half(self) -> bool:
        """Whether it is a 16-bit weight, of which the optimizer has a float32 master."""
        return backend.is_half(self.dtype)

    @property
    def value(self) -> DistArray:
        """The weight. It is made when first asked for, so that a stage may build a model and hold its own part."""
        if self._value is None:
            whole = self._make(self._stored, "float32" if self.half else self.dtype)
            self._value = rounded(whole, self.dtype)
        return self._value

    @value.setter
    def value(self, value: DistArray) -> None:
        self._value = value

    def use(self, layout: Layout) -> DistArray:
        """Return the weight as a layer uses it.

        **Communication:** an exchange from the stored layout, unless it was begun before (`layers.prefetch`).
        """
        return self.value.redistribute(layout) if self.prefetch is None else self.prefetch.take(self, layout)

    def accumulate(self, grad: DistArray) -> None:
        """Add a contribution, in any layout, to the gradient, which stays partial over the deferred axes.

        **Communication:** one redistribution to the stored layout, or to that of the optimizer's state where nothing is
        deferred: reduce_scatters over the axes that cut it. In a step with `layers.buckets.GradientBuckets` the latter
        is begun and goes on while the backward pass does.
        """
        grad = widened(grad)
        if self.deferred:
            partial = [axis for axis in self.deferred if axis in grad.layout.partial]
            self.add(grad.redistribute(self.value.layout.with_partial(*partial)))
            if self.buckets is not None:
                self.buckets.counted(self)
        elif self.buckets is not None:
            self.buckets.contribute(self, grad)
        else:
            self.add(grad.redistribute(self.owned))

    def add(self, grad: DistArray) -> None:
        """Add to the gradient, in the layout that it has."""
        self.grad = grad if self.grad is None else self.grad + grad

    def reduce(self) -> DistArray:
        """Finish the gradient after the last microbatch and return it, in the layout of the optimizer's state.

        **Communication:** over the deferred axes an allreduce, with ZeRO a reduce_scatter, unless it is under way.
        """
        while self.coming:
            self.coming[0].finish()
        if self.grad is None:
            self.grad = self.zeros()
        self.grad = self.grad.redistribute(self.owned)
        return self.grad

    def zeros(self) -> DistArray:
        """Return zeros in the layout of the optimizer's state, in the dtype of the gradient."""
        return distarray.zeros(self.shape, self.parallelism.grid, self.owned, "float32" if self.half else self.dtype)

    def master(self) -> DistArray:
        """Return the weight in float32, in the layout of the optimizer's state.

        It was rounded to 16 bits when it was drawn: an element that is still what it was then is what was drawn.
        """
        share, drawn = self.value.redistribute(self.owned).local, self._make(self.owned, "float32")
        xp = backend.namespace(share)
        same = xp.astype(drawn.local, share.dtype) == share
        return drawn.like(xp.where(same, drawn.local, xp.astype(share, drawn.local.dtype)))

    def share(self) -> DistArray:
        """Return the part of the weight that this rank's optimizer steps, in the weight's own memory."""
        return self.value.redistribute(self.owned)

    def refresh(self, share: DistArray) -> None:
        """Let all ranks that hold the weight have the parts that were stepped, rounded if they are of a master.

        **Communication:** with ZeRO an allgather over ``data``, unless the weight is stored so.
        """
        if self.owned != self.value.layout or self.half:
            share = rounded(share, self.value.dtype)
            self.value.local[...] = share.redistribute(self.value.layout).local

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.value})"


class Layer:
    """Base of all layers.

    A layer implements ``forward(x, ctx) -> (y, cache)`` and ``backward(dy, cache, later=None) -> dx``. Both are pure
    but for the gradients of parameters, which are accumulated in them. `dy` may come in any layout, partial sums
    included; dx goes in the layout of x. With `later` a list, the weight products are appended to it as functions
    instead of being done.
    """

    def forward(self, x: Any, ctx: Context) -> tuple[Any, Any]:
        """Return the output and what `backward` needs."""
        raise NotImplementedError

    def again(self, x: Any, ctx: Context) -> Any:
        """Return what `backward` needs, alone: what `forward` does for the output only may be left out."""
        return self.forward(x, ctx)[1]

    def backward(self, dy: Any, cache: Any, later: Later = None) -> Any:
        """Return the cotangent of the input, in the input's layout."""
        raise NotImplementedError

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters of this layer and its parts, each once, in the order of construction."""
        seen: set[int] = set()
        for parameter in self.places():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    @cached_property
    def label(self) -> str:
        """Its name, or what the names of its parameters have in common, or its class."""
        names = [parameter.name.split(".")[:-1] for parameter in self.parameters()]
        common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]
        return getattr(self, "name", None) or ".".join(common) or type(self).__name__

    def places(self) -> Iterator[Parameter]:
        """Yield the parameters as often as this layer and its parts hold each: a tied one comes from every place."""
        for value in vars(self).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Parameter):
                    yield item
                elif isinstance(item, Layer):
                    yield from item.places()


class Chain(Layer):
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

    def again(self, x: DistArray, ctx: Context) -> Any:
        """Return the caches, without the output of the last layer."""
        *first, last = self.layers
        x, caches = Chain(*first).forward(x, ctx)
        return [*caches, last.again(x, ctx)]

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


class Each(Layer):
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


class Residual(Chain):
    """``x + chain(x)``, for a chain whose output is shaped as its input."""

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return ``x + chain(x)``."""
        y, cache = super().forward(x, ctx)
        return x + y, (cache, x.layout.with_partial())

    def again(self, x: DistArray, ctx: Context) -> Any:
        """Return the chain's caches."""
        return super().again(x, ctx), x.layout.with_partial()

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> Any:
        """Return ``dy`` and the chain's cotangent together."""
        caches, layout = cache
        dy = dy.redistribute(layout)
        return dy + super().backward(dy, caches, later)


class Heads(Layer):
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
