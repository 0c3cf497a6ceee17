"""Learning rates as functions of the step: a linear warm-up, then one of several shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from colossal_mpi.errors import OptionError


@dataclass(frozen=True)
class Rate:
    """A learning rate: call it with the number of a step, from 0.

    Parameters
    ----------
    shape : {"constant", "linear", "cosine", "polynomial", "wsd", "multi-step", "one-cycle"}
        Of the way from `peak`, at step `warmup`, to ``floor * peak``, at step `total` and from there on.
    peak : float
    total : int
        Number of steps.
    warmup : int
        Step i before this one has ``peak (i + 1) / warmup``. In ``one-cycle`` the way up is half a cosine, from
        ``peak / 25`` at step 0 to `peak` at step `warmup`.
    floor : float
        Share of `peak` at the end; of no meaning for ``constant`` and ``multi-step``.
    power : float
        Of ``polynomial``: what is left to do, to this power.
    decay : float
        Of ``wsd`` (warm-up, stable, decay): the share of the steps after the warm-up in which the rate falls, linearly.
    milestones : tuple of int, gamma : float
        Of ``multi-step``: from each of these steps on, `gamma` times less.

    Raises
    ------
    OptionError
        If there is no such shape or a number is out of its range.

    References
    ----------
    Loshchilov, Hutter: SGDR, 2017 (cosine). Smith, Topin: Super-convergence, 2018 (one-cycle).
    Hu et al.: MiniCPM, 2024 (warm-up, stable, decay).
    """

    shape: str
    peak: float
    total: int
    warmup: int = 0
    floor: float = 0.0
    power: float = 1.0
    decay: float = 0.2
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise OptionError(f"learning rate of shape {self.shape!r}: use one of {', '.join(map(repr, _SHAPES))}")
        if self.warmup < 0 or self.total < 1 or not 0 <= self.floor <= 1 or not 0 < self.decay <= 1 or self.power < 0:
            raise OptionError(
                f"{self}: warmup must be 0 or more, total 1 or more, floor from 0 to 1, decay above 0 to 1 and power "
                "0 or more"
            )

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return self.peak * self._rising(step)
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.peak * _SHAPES[self.shape](self, step, done)

    def _rising(self, step: int) -> float:
        if self.shape == "one-cycle":
            return _CYCLE_START + (1 - _CYCLE_START) * (1 - _cosine(step / self.warmup))
        return (step + 1) / self.warmup

    def _falling(self, left: float) -> float:
        return self.floor + (1 - self.floor) * left


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


_CYCLE_START = 1 / 25
_SHAPES: Mapping[str, Callable[[Rate, int, float], float]] = {
    "constant": lambda rate, step, done: 1.0,
    "linear": lambda rate, step, done: rate._falling(1 - done),
    "cosine": lambda rate, step, done: rate._falling(_cosine(done)),
    "polynomial": lambda rate, step, done: rate._falling((1 - done) ** rate.power),
    "wsd": lambda rate, step, done: rate._falling(min(1.0, (1 - done) / rate.decay)),
    "multi-step": lambda rate, step, done: rate.gamma ** sum(step >= place for place in rate.milestones),
    "one-cycle": lambda rate, step, done: rate._falling(_cosine(done)),
}
