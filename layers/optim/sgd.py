"""SGD and LARS: steps along a running sum of the gradients.

The trainer makes them by name from the registry. They work on local blocks alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.optim.base import Group, Optimizer
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter


@register_optimizer("sgd")
class SGD(Optimizer):
    """Stochastic gradient descent with momentum; the weight decay is part of the gradient, as in PyTorch.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own.
    lr : float
        Learning rate of a step for which `step` is given none.
    momentum : float
        Share of the old velocity that a step keeps, from 0 to 1.
    nesterov : bool
        Step along the gradient and the velocity after it (Sutskever et al. 2013).
    weight_decay : float
        Decay of weights and tables. Gains and biases do not decay.
    clip : float, optional
        Greatest norm of the gradient. A longer gradient is scaled to this norm.
    **rest : dict
        ``decays``, ``scaling`` and ``offload``, as `Optimizer` takes them.

    Notes
    -----
    With ``g = g + weight_decay w`` and the velocity ``v = momentum v + g``, a step is ``w = w - lr v``, or with
    Nesterov momentum ``w = w - lr (g + momentum v)``.

    **Communication:** the collectives of `Optimizer.step`.

    References
    ----------
    Sutskever et al.: On the importance of initialization and momentum in deep learning, 2013.

    Examples
    --------
    >>> optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
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
    """SGD with a learning rate for each parameter in proportion to its norm over its gradient's norm.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own.
    lr : float
        Learning rate of a step for which `step` is given none.
    trust : float
        Ratio of a step to the norm of the parameter, before the learning rate.
    **options : dict
        ``momentum``, ``nesterov``, ``weight_decay`` (by default 1e-4), ``clip`` and what else `SGD` takes.

    Notes
    -----
    A gradient is multiplied by ``trust |w| / (|g| + weight_decay |w|)``. A parameter that does not decay (a gain or a
    bias) has the learning rate of the step, as usual.

    **Communication:** the collectives of `Optimizer.step`, and for each parameter that decays, two allreduces of one
    word over the axes that cut it.

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
        trust, decay = options.pop("trust"), options["weight_decay"]
        if decay:
            # |w|, |g| of arrays in the layout of the state: sums of squares, allreduce over the axes that cut them
            weight, gradient = w.norm(), g.norm()
            share = trust * weight / (gradient + decay * weight) if weight > 0 and gradient > 0 else 1.0
            g = (g + w * decay) * share
        super().update(parameter, w, g, slots, lr, **{**options, "weight_decay": 0.0})
