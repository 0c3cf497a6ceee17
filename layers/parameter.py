"""Parameters: weights, cut as far as the mode allows, with their gradients and the layout of optimizer states.

Layers make a `Parameter` for each weight, take it with `use` and add gradients with `accumulate`. Optimizers,
checkpoints and pipelines hold the same objects. `colossal_mpi.layers.overlap` puts its buckets and its prefetch into
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from numpy.typing import DTypeLike

from colossal_mpi import distarray, random
from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.precision import require_dtype, rounded, widened
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


class Reduction(Protocol):
    """A reduction of gradients, under way or yet to begin; `layers.overlap` implements it."""

    def finish(self) -> None:
        """Wait for the reduction and add its results to the gradients of the parameters."""


class Buckets(Protocol):
    """The buckets that take contributions to gradients during a step; `layers.overlap` implements them."""

    def count(self, parameter: Parameter) -> None:
        """Count a contribution to a gradient that stays partial until the last contribution."""

    def contribute(self, parameter: Parameter, gradient: DistArray) -> None:
        """Take a contribution that is to be reduced at once."""


class Prefetcher(Protocol):
    """The prefetch that gathers weights before they are used; `layers.overlap` implements it."""

    def take(self, parameter: Parameter, layout: Layout) -> DistArray:
        """Return a weight in the layout of its use."""


class Parameter:
    """A weight, cut as far as the mode allows, with its gradient in the same layout.

    Parameters
    ----------
    name : str
        Its full name, unique in the model: the stream of its random numbers and its key in checkpoints.
    shape : sequence of int
        Its global shape.
    used : Layout
        The layout in which its layer uses it.
    parallelism : Parallelism
        The mode, which chooses the layouts in which weight, gradient and optimizer state are stored.
    std : float, optional
        Standard deviation of the normal initial values; None fills the weight with `fill`.
    fill : float
        The initial value where `std` is None.
    seed : int, optional
        Seed of the initial values; None leaves them `fill`, for a weight that is to be loaded.
    dtype : dtype
        Dtype of the weight: float64, float32, float16 or bfloat16.
    inputs : int
        Number of leading dims that belong to the layer's input, for optimizers that take weights as matrices.
    batch : int
        Number of dims before these that count separate matrices: 1 for the experts of a mixture.

    Raises
    ------
    OptionError
        If the dtype is bfloat16 and the package ml_dtypes is not installed.

    Examples
    --------
    >>> Parameter("scale", [768], parallelism.stream("h"), parallelism, fill=1.0)
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
        dtype: DTypeLike = "float32",
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
        """The grid of the whole model, if pipeline stages cut it; None: the parameter's own grid is all of it."""
        self.frozen = False
        """True for a weight that is not trained: it has no gradient and no optimizer state."""
        self.counted = True
        """False for the copy of a tied weight that an earlier pipeline stage holds, too: sums count it there."""
        self._dtype = require_dtype(dtype)
        self._value: DistArray | None = None
        self.buckets: Buckets | None = None
        self.reductions: list[Reduction] = []
        """Reductions that have contributions to the gradient under way; `reduce` waits for them."""
        self.prefetch: Prefetcher | None = None

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
        """True if the weight has 16 bits, so that the optimizer keeps float32 master weights."""
        return backend.is_half(self.dtype)

    @property
    def value(self) -> DistArray:
        """The weight, made at its first use: a pipeline stage constructs a whole model but makes only its part."""
        if self._value is None:
            whole = self._make(self._stored, "float32" if self.half else self.dtype)
            self._value = rounded(whole, self.dtype)
        return self._value

    @value.setter
    def value(self, value: DistArray) -> None:
        self._value = value

    def use(self, layout: Layout) -> DistArray:
        """Return the weight in the layout in which a layer uses it.

        Parameters
        ----------
        layout : Layout
            The layout that the map of a product, or an elementwise layer, asks for.

        Returns
        -------
        DistArray
            The gathered weight, or the weight itself where it is stored so.

        Notes
        -----
        **Communication:** an allgather over the axes that cut the stored weight and not the used one, unless a prefetch
        has begun it.
        """
        # W[H_row, F_col] as it is stored -> W[H, F_col] as the map takes it: allgather over row
        return self.value.redistribute(layout) if self.prefetch is None else self.prefetch.take(self, layout)

    def accumulate(self, grad: DistArray) -> None:
        """Add a contribution to the gradient.

        Parameters
        ----------
        grad : DistArray
            The contribution, of the weight's shape, in any layout, partial sums included.

        Notes
        -----
        The gradient stays partial over the deferred axes (`Parallelism.deferred`) until `reduce`.

        **Communication:** a reduce_scatter over the axes that cut the stored weight, or the optimizer's state where
        nothing is deferred. In gradient buckets the latter overlaps with the backward pass. A frozen weight drops the
        contribution.
        """
        if self.frozen:
            return
        grad = widened(grad)
        if self.deferred:
            partial = [axis for axis in self.deferred if axis in grad.layout.partial]
            # dW[H, F_col] {U_row,U_data} -> dW[H_row, F_col] {U_data}: reduce_scatter over row
            self.add(grad.redistribute(self.value.layout.with_partial(*partial)))
            if self.buckets is not None:
                self.buckets.count(self)
        elif self.buckets is not None:
            self.buckets.contribute(self, grad)
        else:
            # dW[H, F_col] {U_row,U_data} -> dW[H_(row,data), F_col]: reduce_scatter over row and data
            self.add(grad.redistribute(self.owned))

    def add(self, grad: DistArray) -> None:
        """Add a contribution that is in the layout of the gradient.

        Parameters
        ----------
        grad : DistArray
            The contribution.
        """
        self.grad = grad if self.grad is None else self.grad + grad

    def reduce(self) -> DistArray:
        """Return the complete gradient, after the last microbatch.

        Returns
        -------
        DistArray
            The gradient, in the layout of the optimizer's state.

        Notes
        -----
        **Communication:** over the deferred axes an allreduce, with ZeRO a reduce_scatter, unless it is under way.
        """
        while self.reductions:
            self.reductions[0].finish()
        if self.grad is None:
            self.grad = self.zeros()
        # dW[H_row, F_col] {U_data} -> dW[H_row, F_col]: allreduce over data; with ZeRO -> dW[H_(row,data), F_col]
        self.grad = self.grad.redistribute(self.owned)
        return self.grad

    def zeros(self) -> DistArray:
        """Return zeros in the layout of the optimizer's state.

        Returns
        -------
        DistArray
            Zeros of the weight's shape, in the dtype of the gradient.
        """
        return distarray.zeros(self.shape, self.parallelism.grid, self.owned, "float32" if self.half else self.dtype)

    def master(self) -> DistArray:
        """Return the master weight of a 16-bit weight.

        Initial values are drawn in float32 and rounded: an element that still has its rounded initial value gets the
        value that was drawn.

        Returns
        -------
        DistArray of float32
            The weight, in the layout of the optimizer's state.
        """
        # W[H_row, F_col] -> W[H_(row,data), F_col]: a part of this rank's block, nothing moves
        share, drawn = self.value.redistribute(self.owned).local, self._make(self.owned, "float32")
        xp = backend.namespace(share)
        same = xp.astype(drawn.local, share.dtype) == share
        return drawn.like(xp.where(same, drawn.local, xp.astype(share, drawn.local.dtype)))

    def share(self) -> DistArray:
        """Return the part of the weight that this rank's optimizer updates.

        Returns
        -------
        DistArray
            A view of the weight, in the layout of the optimizer's state.
        """
        # W[H_row, F_col] -> W[H_(row,data), F_col]: a part of this rank's block, nothing moves
        return self.value.redistribute(self.owned)

    def refresh(self, share: DistArray) -> None:
        """Write the updated parts of all ranks into the weight.

        Parameters
        ----------
        share : DistArray
            The weight or its master, in the layout of the optimizer's state.

        Notes
        -----
        A master is rounded to the dtype of the weight.

        **Communication:** with ZeRO 1 and 2 an allgather over ``data``, ``seq`` and ``ulysses``; otherwise none.
        """
        if self.owned != self.value.layout or self.half:
            share = rounded(share, self.value.dtype)
            # W[H_(row,data), F_col] -> W[H_row, F_col]: allgather over data
            self.value.local[...] = share.redistribute(self.value.layout).local

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.value})"
