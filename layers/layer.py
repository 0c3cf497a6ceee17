"""What a layer is: a pure forward that returns its cache, and a manual backward that takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from colossal_mpi import distarray, random
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout

Later = list[Callable[[], None]] | None
"""Where a backward pass puts its weight products for later; None does them at once."""


@dataclass(frozen=True)
class Context:
    """What a layer may know of the step that it is part of."""

    step: int = 0
    microbatch: int = 0
    train: bool = True


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
    seed : int
    dtype : optional
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
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        self.name, self.deferred = name, parallelism.deferred
        layout, grid = parallelism.store(used, shape), parallelism.grid
        if std is None:
            self.value = distarray.full(shape, fill, grid, layout, dtype)
        else:
            values = random.normal(shape, grid, layout, seed, name)
            self.value = (values * std).astype(self._dtype(grid, dtype))
        self.grad: DistArray | None = None

    @staticmethod
    def _dtype(grid: Any, dtype: Any) -> Any:
        return getattr(grid.xp, dtype) if isinstance(dtype, str) else dtype

    def accumulate(self, grad: DistArray) -> None:
        """Add a contribution, in any layout, to the gradient, which stays partial over the deferred axes.

        **Communication:** one redistribution to the stored layout: reduce_scatters over the axes that cut it.
        """
        partial = [axis for axis in self.deferred if axis in grad.layout.partial]
        grad = grad.redistribute(self.value.layout.with_partial(*partial))
        self.grad = grad if self.grad is None else self.grad + grad

    def reduce(self) -> DistArray:
        """Finish the gradient after the last microbatch and return it, in the layout of the weight.

        **Communication:** an allreduce over the deferred axes.
        """
        if self.grad is None:
            self.grad = self.value * 0
        self.grad = self.grad.redistribute(self.value.layout)
        return self.grad

    def __repr__(self) -> str:
        return f"Parameter({self.name}, {self.value})"


class Layer:
    """Base of all layers.

    A layer implements ``forward(x, ctx) -> (y, cache)`` and ``backward(dy, cache, later=None) -> dx``. Gradients of its
    parameters are accumulated in them; with `later` a list, the weight products are appended to it as functions
    instead of being done.
    """

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the output and what `backward` needs."""
        raise NotImplementedError

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> Any:
        """Return the cotangent of the input, in the input's layout."""
        raise NotImplementedError

    def parameters(self) -> Iterator[Parameter]:
        """Yield the parameters of this layer and its parts, each once, in the order of construction."""
        seen: set[int] = set()
        for parameter in self._all():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    def _all(self) -> Iterator[Parameter]:
        for value in vars(self).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Parameter):
                    yield item
                elif isinstance(item, Layer):
                    yield from item._all()


def do(work: Callable[[], None], later: Later) -> None:
    """Do `work` now, or leave it for later."""
    if later is None:
        work()
    else:
        later.append(work)


def saved_arrays(cache: Any) -> list[DistArray | Any]:
    """Return the arrays held by a cache, each buffer once."""
    found: dict[int, Any] = {}

    def visit(item: Any) -> None:
        if isinstance(item, tuple | list):
            for part in item:
                visit(part)
        elif isinstance(item, DistArray):
            visit(item.local)
        elif hasattr(item, "nbytes") and hasattr(item, "shape"):
            base = item
            while getattr(base, "base", None) is not None and hasattr(base.base, "nbytes"):
                base = base.base
            found[id(base)] = base

    visit(cache)
    return list(found.values())
