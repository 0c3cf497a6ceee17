"""Moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.precision import rounded, widened


class MovingAverage:
    """Exponential moving averages of parameters, each rank of the blocks that it stores; of 16-bit floats in 32.

    Parameters
    ----------
    parameters : iterable of Parameter
    decay : float
        Share of the old average that an update keeps. With t updates done, ``(1 + t) / (10 + t)`` if that is less, so
        that the first weights are soon forgotten.

    **Communication:** none.

    References
    ----------
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float = 0.999) -> None:
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.averages = {p.name: widened(p.value).copy() for p in self.parameters}

    def update(self) -> None:
        """Take in the weights as they are now."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for parameter in self.parameters:
            average = self.averages[parameter.name].local
            average *= keep
            average += (1 - keep) * widened(parameter.value).local

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the weights, for an evaluation, until the context ends."""
        kept = [parameter.value.copy() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.value.local[...] = rounded(self.averages[parameter.name], parameter.value.dtype).local
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.value.local[...] = value.local

    def state(self) -> Mapping[str, DistArray]:
        """Return the averages by ``average/<parameter>``; `updates` is the rest of the state."""
        return {f"average/{name}": array for name, array in self.averages.items()}
