"""Adam and LAMB."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import kernels
from colossal_mpi.layers.optim.base import Group, Optimizer
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter


@register_optimizer("adamw")
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
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by the first moment over the root of the second."""
        kernels.of(w.grid).adamw(w.local, g.local, *_moments(slots), self.steps, lr=lr, **options)


def _moments(slots: dict[str, DistArray]) -> tuple[Any, Any]:
    return slots["m"].local, slots["v"].local


@register_optimizer("lamb")
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
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by Adam's direction and the decay together, scaled to the norm of the weight."""
        direction = kernels.of(g.grid).adam(g.local, *_moments(slots), self.steps, options["betas"], options["eps"])
        direction += options["weight_decay"] * w.local
        length, weight = w.like(direction).norm(), w.norm()
        direction *= lr * (weight / length if weight > 0 and length > 0 else 1.0)
        w.local[...] -= direction
