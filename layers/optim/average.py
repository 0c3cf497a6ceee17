"""Exponential moving averages of weights, with which the trainer validates.

The trainer updates a `MovingAverage` after each step of the optimizer. Each rank averages the blocks that it stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from colossal_mpi.distarray import DistArray
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.precision import rounded, widened


class MovingAverage:
    """Exponential moving averages of parameters, in which each rank averages the blocks that it stores.

    Averages of 16-bit floats are float32.

    Parameters
    ----------
    parameters : iterable of Parameter
        Parameters to average.
    decay : float
        Share of the old average that an update keeps. After t updates it is ``(1 + t) / (10 + t)`` if that is less, so
        that the first weights are soon forgotten.

    Notes
    -----
    **Communication:** none.

    References
    ----------
    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, 1992.
    """

    def __init__(self, parameters: Iterable[Parameter], decay: float = 0.999) -> None:
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.averages = {p.name: widened(p.value).copy() for p in self.parameters}

    def update(self) -> None:
        """Move the averages towards the current weights."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for parameter in self.parameters:
            average = self.averages[parameter.name].local
            average *= keep
            average += (1 - keep) * widened(parameter.value).local

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as weights until the context ends.

        Yields
        ------
        None
            The weights are the averages inside the context and are restored, to the bit, at its end.
        """
        kept = [parameter.value.copy() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.value.local[...] = rounded(self.averages[parameter.name], parameter.value.dtype).local
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.value.local[...] = value.local

    def state(self) -> Mapping[str, DistArray]:
        """Return the averages for a checkpoint. The number `updates` is the rest of the state.

        Returns
        -------
        mapping of str to DistArray
            Averages by ``average/<name of the parameter>``, in the layouts of the weights.
        """
        return {f"average/{name}": array for name, array in self.averages.items()}
