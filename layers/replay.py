"""Arrays that are not kept for the backward pass, but made again in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from colossal_mpi.distarray import DistArray
from colossal_mpi.grid import Grid
from colossal_mpi.layers.layer import Context, Layer
from colossal_mpi.layout import Layout
from colossal_mpi.platform.backend import Block


class Replay(NamedTuple):
    """A forward pass that can be done once more, and what for: its output, or what its backward pass needs.

    Layers are pure, and masks of dropout functions of the step and the sample, so that the bits are those of the first
    time. Losses that layers report of their own are not reported again.
    """

    layer: Layer
    x: Any
    """The input, or how to make it again."""
    ctx: Context

    @classmethod
    def of(cls, layer: Layer, x: Any, ctx: Context) -> Replay:
        """Return what makes the output of a layer again."""
        return cls(layer, x.replay if isinstance(x, Replayable) else x, replace(ctx, losses=None))

    def input(self) -> Any:
        """Return the input."""
        return self.x.output() if isinstance(self.x, Replay) else self.x

    def output(self) -> Any:
        """Return the output. **Communication:** that of the forward pass."""
        return self.layer.forward(self.input(), self.ctx)[0]

    def cache(self) -> Any:
        """Return what the backward pass needs. **Communication:** that of `Layer.replay`."""
        return self.layer.replay(self.input(), self.ctx)


class Replayable(DistArray):
    """An array that comes with how to make it again: who needs it later keeps that in its place."""

    __slots__ = ("replay",)

    def __init__(self, local: Block, shape: Sequence[int], layout: Layout, grid: Grid, replay: Replay) -> None:
        super().__init__(local, shape, layout, grid)
        self.replay = replay


def kept(x: Any, gathered: Any) -> Any:
    """Return what a layer keeps of its input `x`, of which it needs `gathered` in its backward pass."""
    return x.replay if isinstance(x, Replayable) else gathered


def taken(x: Any) -> Any:
    """Return the array that was kept, or made again."""
    return x.output() if isinstance(x, Replay) else x
