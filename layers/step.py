"""Forward and backward of a model and its loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.layer import Context, Layer


class Loss(Protocol):
    """What ends a model: `CrossEntropy`, `MeanSquaredError` or one's own."""

    def forward(self, x: DistArray, target: DistArray, count: int | None) -> tuple[float, Any]:
        """Return the loss, the same bits on every rank, and what `backward` needs."""

    def backward(self, cache: Any, scale: float = 1.0) -> DistArray:
        """Return the cotangent of x, times a loss scale."""


def backpropagate(
    model: Layer,
    loss: Loss,
    x: DistArray,
    target: DistArray,
    ctx: Context | None = None,
    *,
    count: int | None = None,
) -> float:
    """Return the loss of a model and add its gradients to those of the parameters.

    Parameters
    ----------
    model : Layer
    loss : Loss
    x, target : DistArray
        What `model` takes, and what `loss` compares its output with.
    ctx : Context, optional
    count : int, optional
        What the loss divides by: the labels that count in all microbatches of the step, where there are several.

    Returns
    -------
    float
        With the losses that layers add of their own.
    """
    ctx, own = ctx or Context(), dict[str, float]()
    y, cache = model.forward(x, replace(ctx, losses=own))
    value, kept = loss.forward(y, target, count)
    model.backward(loss.backward(kept, ctx.scale), cache)
    if ctx.losses is not None:
        ctx.losses.update(own)
    return value + sum(own.values())
