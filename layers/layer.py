"""The base class of layers: a pure forward returns the output and a cache, and a manual backward takes the cache.

`Layer` is the base class of every layer and every model. Training, pipelines and generation call its `forward` and
`backward`; the layers call distributed products, redistributions and the kernels of their grid. The base also has the
two methods through which a layer keeps its input for the backward pass, `save` and `load`: with them an input may be
recomputed instead of being kept, and no layer has to know (`colossal_mpi.layers.recompute`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias, TypeVar

from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.platform.backend import Block

Cache: TypeAlias = Any
"""The object that a layer's `forward` hands to its `backward`; nobody else looks into it."""

Arrays: TypeAlias = Any
"""The input or output of a layer: a DistArray, or a tuple of them for a layer that takes or returns several."""

Later: TypeAlias = list[Callable[[], None]] | None
"""The list to which a backward pass appends weight products, to be done later; None: it does them at once."""

Kept = TypeVar("Kept")


class Layer:
    """Base of all layers.

    A layer implements `forward` and `backward`. Both are pure, except that `backward` adds to the gradients of the
    parameters. A layer that needs its input in the backward pass keeps it with `save` and gets it back with `load`.
    """

    def forward(self, x: Arrays, ctx: Context) -> tuple[Arrays, Cache]:
        """Return the output and what `backward` needs.

        Parameters
        ----------
        x : DistArray or tuple of DistArray
            The input, in any layout, partial sums included.
        ctx : Context
            The step, and the tokens' positions and masks.

        Returns
        -------
        y : DistArray or tuple of DistArray
            The output, in the layout that the next layer takes.
        cache : object
            The input of `backward`: arrays, layouts, and the caches of the layer's parts, in tuples and lists.
        """
        raise NotImplementedError

    def backward(self, dy: Arrays, cache: Cache, later: Later = None) -> Arrays:
        """Return the cotangent of the input, and add to the gradients of the parameters.

        Parameters
        ----------
        dy : DistArray or tuple of DistArray
            The cotangent of the output, in any layout, partial sums included.
        cache : object
            What `forward` returned. It may be used again.
        later : list of functions, optional
            Append the products of weight gradients to it as functions, instead of doing them at once: a pipeline does
            them when it would wait (zero-bubble).

        Returns
        -------
        DistArray or tuple of DistArray
            The cotangent of the input, in the input's layout with partial sums made replicated.
        """
        raise NotImplementedError

    def replay(self, x: Arrays, ctx: Context) -> Cache:
        """Return what `backward` needs, without the output: a layer may leave out what only the output needs.

        Parameters
        ----------
        x : DistArray or tuple of DistArray
            The input of the forward pass.
        ctx : Context
            The context of the forward pass.

        Returns
        -------
        object
            The cache that `forward` returns.
        """
        return self.forward(x, ctx)[1]

    def save(self, x: Arrays, needed: Kept) -> Kept | Replay:
        """Return the object to keep of an input for the backward pass.

        Parameters
        ----------
        x : DistArray or tuple of DistArray
            The input of `forward`, as it came.
        needed : object
            The form of x that the backward pass needs: x itself, x gathered, or blocks of it.

        Returns
        -------
        object
            `needed`; or, if the layer before wants its output to be recomputed, the `Replay` that makes x again.
        """
        return x.replay if isinstance(x, Replayable) else needed

    def load(self, saved: Kept | Replay, needed: Callable[[Any], Kept] | None = None) -> Kept:
        """Return what `save` was given.

        Parameters
        ----------
        saved : object
            What `save` returned.
        needed : function, optional
            Makes the `needed` of `save` from an input that had to be recomputed; by default it is the input itself, in
            the layout in which it came.

        Returns
        -------
        object
            The `needed` of `save`, with the same bits whether it was kept or recomputed.

        Notes
        -----
        **Communication:** none if it was kept; else the communication of the forward pass of the layer before, and of
        `needed`.
        """
        if not isinstance(saved, Replay):
            return saved
        x = saved.output()
        return x if needed is None else needed(x)

    def parameters(self) -> Iterator[Parameter]:
        """Return an iterator over the parameters of this layer and its parts, each once, in the order of construction.

        Yields
        ------
        Parameter
            A parameter that was not yielded before.
        """
        seen: set[int] = set()
        for parameter in self.parameter_uses():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter

    def parameter_uses(self) -> Iterator[Parameter]:
        """Return an iterator over the parameters, a tied one as often as layers hold it.

        Yields
        ------
        Parameter
            A parameter of this layer or of one of its parts.
        """
        for item in self._items():
            if isinstance(item, Parameter):
                yield item
            else:
                yield from item.parameter_uses()

    def walk(self) -> Iterator[Layer]:
        """Return an iterator over this layer and all its parts, in the order of construction.

        Yields
        ------
        Layer
            The layer itself first, then each part before the parts of it; a part that two layers share comes twice.
        """
        yield self
        for item in self._items():
            if isinstance(item, Layer):
                yield from item.walk()

    def _items(self) -> Iterator[Parameter | Layer]:
        """Yield the parameters and layers that this layer holds itself."""
        for value in vars(self).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Parameter | Layer):
                    yield item

    @cached_property
    def label(self) -> str:
        """The layer's name; else the common prefix of its parameters' names; else its class."""
        names = [parameter.name.split(".")[:-1] for parameter in self.parameters()]
        common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]
        return getattr(self, "name", None) or ".".join(common) or type(self).__name__


class Replay(NamedTuple):
    """A forward pass that can be done once more, for its output or for the cache of its backward pass.

    Layers are pure, and the masks of dropout are functions of step and sample, so that the bits are the same as the
    first time. Auxiliary losses are not reported a second time.
    """

    layer: Layer
    x: Arrays
    """The input, or the `Replay` that makes it again."""
    ctx: Context

    @classmethod
    def of(cls, layer: Layer, x: Arrays, ctx: Context) -> Replay:
        """Return the replay of ``layer.forward(x, ctx)``; an input that is to be recomputed is not kept."""
        silent = replace(ctx, auxiliary=replace(ctx.auxiliary, values=None))
        return cls(layer, x.replay if isinstance(x, Replayable) else x, silent)

    def output(self) -> Arrays:
        """Do the forward pass again and return its output. **Communication:** the collectives of the forward pass."""
        return self.layer.forward(self._input(), self.ctx)[0]

    def cache(self) -> Cache:
        """Return the cache of the backward pass. **Communication:** the collectives of `Layer.replay`."""
        return self.layer.replay(self._input(), self.ctx)

    def _input(self) -> Arrays:
        return self.x.output() if isinstance(self.x, Replay) else self.x


class Replayable(DistArray):
    """An array with the replay that makes it again: `Layer.save` keeps the replay in its place."""

    __slots__ = ("replay",)

    def __init__(self, local: Block, shape: Sequence[int], layout: Layout, grid: Grid, replay: Replay) -> None:
        super().__init__(local, shape, layout, grid)
        self.replay = replay
