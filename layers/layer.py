"""What a layer is: a pure forward that returns its cache, and a manual backward that takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.parameter import Parameter

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
    kv_cache: Any = None
    """The `KVCache` of the tokens before these, to which attention appends; None: these tokens are all."""
    wanted: Any = None
    """Integers ``[b]``, on every rank in NumPy: the index in s of the one token of each sample whose logits are wanted,
    None: those of all."""


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

    def replay(self, x: Any, ctx: Context) -> Any:
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
