"""Adafactor: second moments by rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from colossal_mpi import distarray
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.optim.base import Group, Optimizer, is_weight
from colossal_mpi.layers.optim.matrices import as_matrix, each, from_matrix
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend


@register_optimizer("adafactor")
class Adafactor(Optimizer):
    """Adam without a first moment, whose second moment of a matrix is the product of its rows' and columns' means.

    The state of a weight of r rows and c columns has r + c elements. Steps are relative to a weight's root mean square.
    Each expert's weight of W[e, h, f] is one by itself.

    Parameters
    ----------
    parameters : iterable of Parameter or of Group
    lr : float
        Greatest share of the root mean square that a step changes; ``1 / sqrt(step)`` where that is less.
    decay : float
        The second moment of step t decays by ``1 - t ** decay``.
    eps : float
        Least root mean square of a weight that counts.
    threshold : float
        Greatest root mean square of an update.
    weight_decay : float
    clip : float, optional
    **rest
        ``decays``, as `Optimizer` takes it.

    Notes
    -----
    **Communication:** besides that of `Optimizer.step`, for each weight the sums of its rows and columns over the axes
    that cut them, and three words.

    References
    ----------
    Shazeer, Stern: Adafactor: adaptive learning rates with sublinear memory cost, 2018.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter | Group],
        lr: float = 1e-2,
        decay: float = -0.8,
        eps: float = 1e-3,
        threshold: float = 1.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(parameters, lr, clip, weight_decay, decay=decay, eps=eps, threshold=threshold, **rest)

    def begin(self, parameter: Parameter) -> dict[str, DistArray]:
        """Return zeros for the rows and columns of a weight, on all ranks, for each element of what is none."""
        w = parameter.value
        if not is_weight(parameter):
            return {"v": parameter.zeros()}
        batch, at = parameter.batch, parameter.batch + parameter.inputs
        sizes = {"rows": math.prod(w.shape[batch:at]), "columns": math.prod(w.shape[at:])}
        layout = Layout(*parameter.owned.dims[:batch], None)
        dtype = parameter.zeros().dtype
        return {slot: distarray.zeros([*w.shape[:batch], n], w.grid, layout, dtype) for slot, n in sizes.items()}

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by the gradient over the root of the second moment, relative to the weight."""
        names, batch = list(slots), parameter.batch if "rows" in slots else 0
        for weight, gradient, *own in zip(*(each(x, batch) for x in (w, g, *slots.values())), strict=True):
            self._step(weight, gradient, dict(zip(names, own, strict=True)), parameter.inputs, lr, options)

    def _step(
        self, w: DistArray, g: DistArray, slots: dict[str, DistArray], at: int, lr: float, options: dict[str, Any]
    ) -> None:
        keep = 1 - self.steps ** options["decay"]
        update = self._vector(g, slots["v"], keep) if "v" in slots else self._matrix(g, slots, keep, at)
        rate = min(lr, 1 / math.sqrt(self.steps)) * max(options["eps"], _rms(w))
        update *= rate / max(1.0, _rms(w.like(update)) / options["threshold"])
        w.local[...] *= 1 - lr * options["weight_decay"]
        w.local[...] -= update

    def _vector(self, g: DistArray, v: DistArray, keep: float) -> Any:
        xp = backend.namespace(g.local)
        v.local[...] *= keep
        v.local[...] += (1 - keep) * g.local * g.local
        return g.local / xp.sqrt(_floored(v.local))

    def _matrix(self, g: DistArray, slots: dict[str, DistArray], keep: float, at: int) -> Any:
        x = as_matrix(g, at)
        xp, square, means = backend.namespace(x.local), x.like(x.local * x.local), []
        for slot, dim in (("rows", 1), ("columns", 0)):
            mean = slots[slot]
            mean.local[...] *= keep
            mean.local[...] += (1 - keep) / x.shape[dim] * square.sum_over([dim]).replicated().local
            (start, stop) = x.box[1 - dim]
            means.append(mean.local[start:stop])
        level = max(float(backend.to_host(xp.mean(slots["rows"].local))), float(xp.finfo(x.dtype).eps))
        estimate = means[0][:, None] * means[1][None, :] / level
        return from_matrix(x.like(x.local / xp.sqrt(_floored(estimate))), g, at).local


def _floored(x: Any) -> Any:
    """Return second moments, none below the square of the unit of their dtype, as PyTorch has it."""
    xp = backend.namespace(x)
    return xp.clip(x, min=float(xp.finfo(x.dtype).eps) ** 2)


def _rms(x: DistArray) -> float:
    return x.norm() / math.sqrt(x.size)
