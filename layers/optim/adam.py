"""Adam and LAMB."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from colossal_mpi import backend
from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.layer import Parameter
from colossal_mpi.layers.optim.base import Group, Optimizer


class AdamW(Optimizer):
    """Adam with decoupled weight decay and clipping by the global norm.

    Parameters
    ----------
    parameters : iterable of Parameter or of Group
    lr : float
        Used when `step` is given none.
    betas : tuple of float
    eps : float
    weight_decay : float
        Of weights and tables; gains and biases decay not at all.
    clip : float, optional
        Greatest norm of the gradient; a longer one is scaled to it.
    **rest
        ``decays``, as `Optimizer` takes it.

    References
    ----------
    Loshchilov, Hutter: Decoupled weight decay regularization, 2019.
    """

    slots = ("m", "v")

    def __init__(
        self,
        parameters: Iterable[Parameter | Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
        **rest: Any,
    ) -> None:
        super().__init__(parameters, lr, clip, weight_decay, betas=betas, eps=eps, **rest)

    def update(
        self, parameter: Parameter, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by the first moment over the root of the second."""
        direction, w = self._direction(g, slots, options["betas"], options["eps"]), parameter.value
        w.local[...] *= 1 - lr * options["weight_decay"]
        direction *= lr
        w.local[...] -= direction

    def _direction(
        self, gradient: DistArray, slots: dict[str, DistArray], betas: tuple[float, float], eps: float
    ) -> Any:
        """Return the corrected first moment over the root of the corrected second, in memory of its own."""
        (b1, b2), g, m, v = betas, gradient.local, slots["m"].local, slots["v"].local
        m *= b1
        m += (1 - b1) * g
        square = g * g
        square *= 1 - b2
        v *= b2
        v += square
        # m / c1 / (sqrt(v / c2) + eps), with the corrections where they cost no pass over the block
        correction = math.sqrt(1 - b2**self.steps)
        root = backend.namespace(g).sqrt(v)
        root += eps * correction
        direction = m / root
        direction *= correction / (1 - b1**self.steps)
        return direction


class LAMB(AdamW):
    """Adam whose step for each parameter is as long as a share of the parameter: for large batches.

    Parameters are those of `AdamW`.

    **Communication:** besides that of `Optimizer.step`, two allreduces of a word for each parameter, over the axes that
    cut it.

    References
    ----------
    You et al.: Large batch optimization for deep learning: training BERT in 76 minutes, 2020.
    """

    def update(
        self, parameter: Parameter, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by Adam's direction and the decay together, scaled to the norm of the weight."""
        direction, w = self._direction(g, slots, options["betas"], options["eps"]), parameter.value
        direction += options["weight_decay"] * w.local
        length, weight = w.like(direction).norm(), w.norm()
        direction *= lr * (weight / length if weight > 0 and length > 0 else 1.0)
        w.local[...] -= direction
