"""Weights: stored cut as far as the mode allows, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from colossal_mpi import distarray, random
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import require_dtype, rounded, widened
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


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
    batch : int
        How many dims before these number weights that are matrices of their own: those of experts.
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
        batch: int = 0,
    ) -> None:
        self.name, self.shape, self.parallelism = name, tuple(shape), parallelism
        self.inputs, self.batch = inputs, batch
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
