"""Muon: steps that are orthogonal matrices.

The trainer makes it by name from the registry. It views weights as matrices with ``matrices`` and orthogonalises their
momentum with ``linalg.factor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers.optim.adam import AdamW
from colossal_mpi.layers.optim.base import Group, is_weight
from colossal_mpi.layers.optim.matrices import as_matrix, from_matrix, unstacked
from colossal_mpi.layers.optim.registry import register_optimizer
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.linalg import newton_schulz

_SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(1.0, columns / rows)),
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def is_hidden(parameter: Parameter) -> bool:
    """Say whether a parameter is a weight in a repeated block of a model, such as ``blocks.3.mlp.up.weight``."""
    return is_weight(parameter) and any(word.isdigit() for word in parameter.name.split("."))


@register_optimizer("muon")
class Muon(AdamW):
    """Steps that are orthogonal matrices: the momentum of each hidden weight, orthogonalised where it lies.

    Parameters
    ----------
    parameters : iterable of Parameter or Group
        Parameters to update. A `Group` gives its parameters options of their own.
    lr : float
        Learning rate of a step for which `step` is given none.
    momentum : float
        Share of the old velocity that a step keeps, from 0 to 1.
    nesterov : bool
        Step along the gradient and the velocity after it.
    scale : {"rms", "spectral"}
        Factor of the learning rate. ``"rms"`` is ``0.2 sqrt(max(rows, columns))``, with which a step is as long as one
        of AdamW (Liu et al. 2025). ``"spectral"`` is ``sqrt(max(1, columns / rows))`` (Jordan et al. 2024).
    iterations : int
        Number of iterations of `newton_schulz`.
    hidden : callable
        ``hidden(parameter)`` says whether a parameter is orthogonalised. By default the weights of the repeated blocks
        are.
    **options : dict
        ``betas``, ``eps``, ``weight_decay``, ``clip`` and what else `AdamW` takes.

    Raises
    ------
    OptionError
        If there is no such scale.

    Notes
    -----
    Weights are matrices of inputs by outputs: W[H, 3, A, D] has H rows, and the experts' W[E, H, F] is E matrices,
    which are done one after the other where they lie. All other parameters (tables, heads, gains, biases) are stepped
    by AdamW, with the same learning rate if the scale is ``"rms"``.

    **Communication:** the collectives of `Optimizer.step`, and of `newton_schulz` for each hidden weight. No rank holds
    the whole of a weight that is cut.

    References
    ----------
    Jordan et al.: Muon: an optimizer for hidden layers in neural networks, 2024. Liu et al.: Muon is scalable for LLM
    training, 2025.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter | Group],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        scale: str = "rms",
        iterations: int = 5,
        hidden: Callable[[Parameter], bool] = is_hidden,
        **options: Any,
    ) -> None:
        if scale not in _SCALES:
            raise OptionError(f"Muon(scale={scale!r}): use one of {', '.join(map(repr, _SCALES))}")
        self.hidden, self.momentum, self.nesterov = hidden, momentum, nesterov
        self.scale, self.iterations = _SCALES[scale], iterations
        super().__init__(parameters, lr, **options)

    def begin(self, parameter: Parameter) -> dict[str, DistArray]:
        return {"velocity": parameter.zeros()} if self.hidden(parameter) else super().begin(parameter)

    def update(
        self, parameter: Parameter, w: DistArray, g: DistArray, slots: dict[str, DistArray], lr: float, **options: Any
    ) -> None:
        if "velocity" not in slots:
            super().update(parameter, w, g, slots, lr, **options)
            return
        arrays = (unstacked(array, parameter.batch) for array in (w, g, slots["velocity"]))
        for weight, gradient, velocity in zip(*arrays, strict=True):
            self._step(weight, gradient, velocity, parameter.inputs, lr, options["weight_decay"])

    def _step(self, w: DistArray, g: DistArray, velocity: DistArray, inputs: int, lr: float, decay: float) -> None:
        """Update one matrix. Its first `inputs` dims are its rows."""
        velocity.local[...] *= self.momentum
        velocity.local[...] += (1 - self.momentum) * g.local
        ahead = g * (1 - self.momentum) + velocity * self.momentum if self.nesterov else velocity
        # M[H_row, (3, A_col, D)] -> O[H_row, (3, A_col, D)] with O O^T = 1: Newton-Schulz, SUMMA products on the grid
        matrix = as_matrix(ahead, inputs)
        direction = from_matrix(newton_schulz(matrix, self.iterations), w, inputs)
        w.local[...] *= 1 - lr * decay
        w.local[...] -= lr * self.scale(*matrix.shape) * direction.local
