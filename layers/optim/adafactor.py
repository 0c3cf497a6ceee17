"""Adafactor: second moments of matrices by the means of their rows and columns.

The trainer makes it by name from the registry. It views weights as matrices with ``matrices``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from colossal_mpi import distarray
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.optim.base import Group, Optimizer, is_weight
from colossal_mpi.layers.optim.matrices import as_matrix, from_matrix, unstacked
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


@register_optimizer("adafactor")
class Adafactor(Optimizer):
    """Adam without a first moment, with the second moments of a matrix as products of means of rows and columns.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own.
    lr : float
        Greatest relative change of a step: a step is at most this share of the weight's root mean square, and
        ``1 / sqrt(step)`` where that is less.
    decay : float
        Exponent of the decay: step t keeps ``1 - t ** decay`` of the second moment.
    eps : float
        Least root mean square of a weight that counts.
    threshold : float
        Greatest root mean square of an update, which is scaled to it.
    weight_decay : float
        Decay of weights and tables. Gains and biases do not decay.
    clip : float, optional
        Greatest norm of the gradient. A longer gradient is scaled to this norm.
    **rest : dict
        ``decays``, ``scaling`` and ``offload``, as `Optimizer` takes them.

    Notes
    -----
    The state of a weight of r rows and c columns has r + c elements. Each expert's matrix of W[E, H, F] has a state of
    its own.

    **Communication:** the collectives of `Optimizer.step`, and for each weight, allreduces of r and of c words over the
    axes that cut columns and rows, and of three words.

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
        names, batch = list(slots), parameter.batch if "rows" in slots else 0
        for weight, gradient, *own in zip(*(unstacked(x, batch) for x in (w, g, *slots.values())), strict=True):
            self._step(weight, gradient, dict(zip(names, own, strict=True)), parameter.inputs, lr, options)

    def _step(
        self, w: DistArray, g: DistArray, slots: dict[str, DistArray], inputs: int, lr: float, options: dict[str, Any]
    ) -> None:
        """Update one matrix or vector. The first `inputs` dims of a matrix are its rows."""
        keep = 1 - self.steps ** options["decay"]
        update = self._of_vector(g, slots["v"], keep) if "v" in slots else self._of_matrix(g, slots, keep, inputs)
        rate = min(lr, 1 / math.sqrt(self.steps)) * max(options["eps"], _root_mean_square(w))
        update *= rate / max(1.0, _root_mean_square(w.like(update)) / options["threshold"])
        w.local[...] *= 1 - lr * options["weight_decay"]
        w.local[...] -= update

    def _of_vector(self, g: DistArray, v: DistArray, keep: float) -> Block:
        """Return the gradient over the root of its second moment."""
        xp = backend.namespace(g.local)
        v.local[...] *= keep
        v.local[...] += (1 - keep) * g.local * g.local
        direction: Block = g.local / xp.sqrt(_floored(v.local))
        return direction

    def _of_matrix(self, g: DistArray, slots: dict[str, DistArray], keep: float, inputs: int) -> Block:
        """Return the gradient over the root of the outer product of its mean squares by rows and by columns."""
        x = as_matrix(g, inputs)
        xp, square, means = backend.namespace(x.local), x.like(x.local * x.local), []
        for slot, dim in (("rows", 1), ("columns", 0)):
            mean = slots[slot]
            mean.local[...] *= keep
            # G^2[R_row, C_col] summed over C -> rows[R_row] {U_col} -> rows[R] on all ranks; for columns likewise
            mean.local[...] += (1 - keep) / x.shape[dim] * square.sum_over([dim]).replicated().local
            (start, stop) = x.box[1 - dim]
            means.append(mean.local[start:stop])
        level = max(float(backend.to_host(xp.mean(slots["rows"].local))), float(xp.finfo(x.dtype).eps))
        # rows[R_row] columns[C_col] / level -> V[R_row, C_col], local
        estimate = means[0][:, None] * means[1][None, :] / level
        return from_matrix(x.like(x.local / xp.sqrt(_floored(estimate))), g, inputs).local


def _floored(x: Block) -> Block:
    """Return second moments, at least the square of their dtype's machine epsilon, as PyTorch has it."""
    xp = backend.namespace(x)
    return xp.clip(x, min=float(xp.finfo(x.dtype).eps) ** 2)


def _root_mean_square(x: DistArray) -> float:
    return x.norm() / math.sqrt(x.size)
