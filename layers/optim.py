"""Optimizers: each rank updates the blocks that it stores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from colossal_mpi import backend, comm
from colossal_mpi.distarray import DistArray, squares
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Parameter


def gradient_norm(gradients: Sequence[DistArray]) -> float:
    """Return the norm of reduced gradients together, each global element counted once, in float64.

    **Communication:** one allreduce of a single word over the whole grid.
    """
    owned = [g for g in gradients if g.layout.owner(g.grid.axes, g.grid.coords)]
    grid, xp = gradients[0].grid, backend.namespace(gradients[0].local)
    local = sum((squares(g) for g in owned), start=xp.zeros((), dtype=xp.float64))
    return math.sqrt(float(backend.to_host(comm.allreduce(xp.asarray(local), grid, tuple(grid.axes)))))


class AdamW:
    """Adam with decoupled weight decay and clipping by the global norm.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
        Used when `step` is given none.
    betas : tuple of float
    eps : float
    weight_decay : float
        Of parameters with two dims or more; gains and biases decay not at all.
    clip : float, optional
        Greatest norm of the gradient; a longer one is scaled to it.

    References
    ----------
    Loshchilov, Hutter: Decoupled weight decay regularization, 2019.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.weight_decay, self.clip = weight_decay, clip
        self.steps = 0
        self.moments = {p.name: (p.zeros(), p.zeros()) for p in self.parameters}

    def step(self, lr: float | None = None) -> float:
        """Update all weights, forget the gradients, and return the norm that they had.

        **Communication:** the deferred reductions of the gradients and one allreduce of a single word.
        """
        norm = gradient_norm([parameter.reduce() for parameter in self.parameters])
        scale = 1.0 if self.clip is None or norm <= self.clip else self.clip / norm
        self.steps += 1
        for parameter in self.parameters:
            self._update(parameter, self.lr if lr is None else lr, scale)
            parameter.grad = None
        return norm

    def _update(self, parameter: Parameter, lr: float, scale: float) -> None:
        assert parameter.grad is not None
        kernels.adamw(
            parameter.value.local,
            parameter.grad.local,
            *(moment.local for moment in self.moments[parameter.name]),
            self.steps,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay if parameter.value.ndim > 1 else 0.0,
            scale=scale,
        )

    def state(self) -> Mapping[str, DistArray]:
        """Return the moments by ``m/<parameter>`` and ``v/<parameter>``; `steps` is the rest of the state."""
        return {f"{slot}/{name}": pair[i] for name, pair in self.moments.items() for i, slot in enumerate("mv")}


def warmup_cosine(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.1) -> float:
    """Return the learning rate of `step`: linear to `peak` over `warmup` steps, then a cosine to ``floor * peak``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
