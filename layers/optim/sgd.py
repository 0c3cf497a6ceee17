"""Stochastic gradient descent with momentum, and LARS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.optim.base import Group, Optimizer
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter


@register_optimizer("sgd")
class SGD(Optimizer):
    """Gradient descent with momentum; the decay is part of the gradient, as in PyTorch.

    Parameters
    ----------
    parameters : iterable of Parameter or of Group
    lr : float
        Used when `step` is given none.
    momentum : float
    nesterov : bool
        Step by the gradient and the momentum after it (Sutskever et al. 2013).
    weight_decay : float
    clip : float, optional
    **rest
        ``decays``, as `Optimizer` takes it.
    """

    slots = ("velocity",)

    def __init__(
        self,
        parameters: Iterable[Parameter | Group],
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip: float | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(parameters, lr, clip, weight_decay, momentum=momentum, nesterov=nesterov, **rest)

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by the velocity."""
        gradient = g.local
        velocity, momentum = slots["velocity"].local, options["momentum"]
        if options["weight_decay"]:
            gradient = gradient + options["weight_decay"] * w.local
        velocity *= momentum
        velocity += gradient
        direction = gradient + momentum * velocity if options["nesterov"] else velocity
        w.local[...] -= lr * direction


@register_optimizer("lars")
class LARS(SGD):
    """SGD whose rate for each parameter is a share of the parameter's norm over its gradient's.

    Parameters
    ----------
    parameters, lr, momentum, nesterov, weight_decay, clip
        As `SGD` takes them.
    trust : float
        That share.

    Notes
    -----
    A parameter that does not decay (a gain or a bias) has no rate of its own, as usual. **Communication:** besides that
    of `Optimizer.step`, two allreduces of a word for each parameter that decays.

    References
    ----------
    You, Gitman, Ginsburg: Large batch training of convolutional networks, 2017.
    """

    def __init__(
        self, parameters: Iterable[Parameter | Group], lr: float = 0.1, trust: float = 1e-3, **options: Any
    ) -> None:
        super().__init__(parameters, lr, **{"weight_decay": 1e-4, **options})
        self.options["trust"] = trust

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        """Step by the velocity of scaled gradients."""
        trust, decay = options.pop("trust"), options["weight_decay"]
        if decay:
            weight, gradient = w.norm(), g.norm()
            share = trust * weight / (gradient + decay * weight) if weight > 0 and gradient > 0 else 1.0
            g = (g + w * decay) * share
        super().update(parameter, w, g, slots, lr, **{**options, "weight_decay": 0.0})
