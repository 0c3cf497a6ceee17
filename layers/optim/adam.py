"""AdamW and LAMB: steps along the first moment of the gradient over the root of the second.

The trainer makes them by name from the registry. They call the kernels ``adamw`` and ``adam`` on local blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers import kernels
from colossal_mpi.layers.optim.base import Group, Optimizer
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.platform.backend import Block


@register_optimizer("adamw")
class AdamW(Optimizer):
    """Adam with decoupled weight decay and clipping by the global norm.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own.
    lr : float
        Learning rate of a step for which `step` is given none.
    betas : tuple of float
        Shares of the old first and second moment that a step keeps, each from 0 to 1.
    eps : float
        Number that is added to the root of the second moment.
    weight_decay : float
        Decay of weights and tables. Gains and biases do not decay.
    clip : float, optional
        Greatest norm of the gradient. A longer gradient is scaled to this norm.
    **rest : dict
        ``decays``, ``scaling`` and ``offload``, as `Optimizer` takes them.

    Notes
    -----
    With the moments ``m = b1 m + (1 - b1) g`` and ``v = b2 v + (1 - b2) g^2``, corrected to m' and v' for their start
    at zero, a step is ``w = (1 - lr weight_decay) w - lr m' / (sqrt(v') + eps)``.

    **Communication:** the collectives of `Optimizer.step`.

    References
    ----------
    Kingma, Ba: Adam: a method for stochastic optimization, 2015. Loshchilov, Hutter: Decoupled weight decay
    regularization, 2019.

    Examples
    --------
    >>> optimizer = AdamW(model.parameters(), lr=3e-4)
    >>> loss = backpropagate(model, loss, x, labels)
    >>> norm = optimizer.step()
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
        kernels.of(w.grid).adamw(w.local, g.local, *_moments(slots), self.steps, lr=lr, **options)


def _moments(slots: dict[str, DistArray]) -> tuple[Block, Block]:
    return slots["m"].local, slots["v"].local


@register_optimizer("lamb")
class LAMB(AdamW):
    """Adam with a step for each parameter in proportion to the parameter's norm, for large batches.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own.
    lr : float
        Learning rate of a step for which `step` is given none.
    betas : tuple of float
        Shares of the old first and second moment that a step keeps, each from 0 to 1.
    eps : float
        Number that is added to the root of the second moment.
    weight_decay : float
        Decay of weights and tables. Gains and biases do not decay.
    clip : float, optional
        Greatest norm of the gradient. A longer gradient is scaled to this norm.
    **rest : dict
        ``decays``, ``scaling`` and ``offload``, as `Optimizer` takes them.

    Notes
    -----
    With d the direction of `AdamW`, the decay of the weight included, a step is ``w = w - lr (|w| / |d|) d``.

    **Communication:** the collectives of `Optimizer.step`, and for each parameter, two allreduces of one word over the
    axes that cut it.

    References
    ----------
    You et al.: Large batch optimization for deep learning: training BERT in 76 minutes, 2020.
    """

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        direction = kernels.of(g.grid).adam(g.local, *_moments(slots), self.steps, options["betas"], options["eps"])
        direction += options["weight_decay"] * w.local
        # |d|, |w| of arrays in the layout of the state: sums of squares, allreduce over the axes that cut them
        length, weight = w.like(direction).norm(), w.norm()
        w.local[...] -= (w.like(direction) * (lr * (weight / length if weight > 0 and length > 0 else 1.0))).local
