"""Learning-rate schedules: the registry of their shapes, and the schedule that gives a rate for each step.

The trainer makes a `LearningRateSchedule` from the configuration and calls it before each step of the optimizer. A new
shape is one function under `register_learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.optim.options import Option, options_of, summary


@dataclass(frozen=True)
class LearningRateKind:
    """An entry of the registry of learning-rate schedules.

    Parameters
    ----------
    name : str
        Name in configurations and on the command line.
    factor : callable
        ``factor(step, progress, **options)`` returns the share of the peak at a step after the warm-up.
    warmup : callable
        ``warmup(step, steps)`` returns the share of the peak at a step of a warm-up of `steps` steps.
    """

    name: str
    factor: Callable[..., float]
    warmup: Callable[[int, int], float]

    @property
    def description(self) -> str:
        """One sentence: the first line of the docstring of the function."""
        return summary(self.factor)

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """The options of this shape by name, with their types, defaults and meanings."""
        return options_of(self.factor)


LEARNING_RATES: dict[str, LearningRateKind] = {}
"""The learning-rate schedules by the names that configurations give them."""

Factor = Callable[..., float]


def linear_warmup(step: int, steps: int) -> float:
    """Return the share of the peak at a step of a linear warm-up: ``(step + 1) / steps``."""
    return (step + 1) / steps


def cosine_warmup(step: int, steps: int) -> float:
    """Return the share of the peak at a step of a warm-up along half a cosine, from 1/25 at step 0."""
    return 1 / 25 + (1 - 1 / 25) * (1 - _half_cosine(step / steps))


def register_learning_rate(
    name: str, warmup: Callable[[int, int], float] = linear_warmup
) -> Callable[[Factor], Factor]:
    """Return a decorator that registers a function as the shape of a learning-rate schedule.

    The first line of the function's docstring describes it in help texts, and its keyword arguments, with their
    defaults and their descriptions in the docstring, are its options in configurations.

    Parameters
    ----------
    name : str
        Name of the schedule in configurations and on the command line.
    warmup : callable
        ``warmup(step, steps)`` returns the share of the peak at a step of a warm-up of `steps` steps.

    Returns
    -------
    callable
        Decorator that returns the function unchanged. The function is called as ``factor(step, progress, **options)``
        with the number of the step, from 0, and the share of the steps after the warm-up that are done, from 0 to 1. It
        returns the share of the peak. The decorator raises `OptionError` if another function has the name.

    Examples
    --------
    >>> @register_learning_rate("square-root")
    ... def square_root(step: int, progress: float) -> float:
    ...     '''Fall with the root of what is left.'''
    ...     return (1 - progress) ** 0.5
    """

    def register(factor: Factor) -> Factor:
        taken = LEARNING_RATES.get(name)
        if taken is not None and taken.factor.__qualname__ != factor.__qualname__:
            raise OptionError(f"register_learning_rate({name!r}): another schedule has this name; choose another one")
        LEARNING_RATES[name] = LearningRateKind(name, factor, warmup)
        return factor

    return register


class LearningRateSchedule:
    """A learning rate as a function of the step: a warm-up to the peak, then a registered shape.

    Parameters
    ----------
    name : str
        Name of a registered shape: ``"constant"``, ``"linear"``, ``"cosine"``, ``"polynomial"``, ``"wsd"``,
        ``"multi-step"``, ``"one-cycle"`` or another one of `LEARNING_RATES`.
    peak : float
        Greatest learning rate. It is reached at step `warmup`.
    total : int
        Number of steps of the training. From this step on the rate stays as it is.
    warmup : int
        Number of steps of the warm-up.
    **options
        Options of the shape, as its entry in `LEARNING_RATES` lists them.

    Raises
    ------
    OptionError
        If the shape is not registered, has no such option, or a number is out of its range.

    Examples
    --------
    >>> rate = LearningRateSchedule("cosine", 3e-4, total=1000, warmup=100, floor=0.1)
    >>> rate(0)
    3e-06
    """

    def __init__(self, name: str, peak: float, total: int, warmup: int = 0, **options: Any) -> None:
        if name not in LEARNING_RATES:
            raise OptionError(f"learning rate {name!r}: use one of {', '.join(map(repr, LEARNING_RATES))}")
        if warmup < 0 or total < 1:
            raise OptionError(f"learning rate {name!r}: warmup={warmup} must be 0 or more, total={total} 1 or more")
        self.kind, self.peak, self.total, self.warmup, self.options = LEARNING_RATES[name], peak, total, warmup, options
        if alien := sorted(set(options) - set(self.kind.options)):
            known = f"use {', '.join(self.kind.options)}" if self.kind.options else "it has none"
            raise OptionError(f"learning rate {name!r}: no option {', '.join(alien)}; {known}")
        self.kind.factor(warmup, 0.0, **options)  # raises if an option is out of its range

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * self.kind.warmup(step, self.warmup)
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.peak * self.kind.factor(step, progress, **self.options)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _above(floor: float, left: float) -> float:
    """Return ``floor + (1 - floor) left``."""
    if not 0 <= floor <= 1:
        raise OptionError(f"learning rate: floor={floor} must be from 0 to 1")
    return floor + (1 - floor) * left


@register_learning_rate("constant")
def constant(step: int, progress: float) -> float:
    """Stay at the peak."""
    return 1.0


@register_learning_rate("linear")
def linear(step: int, progress: float, *, floor: float = 0.0) -> float:
    """Fall along a line from the peak to the floor.

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    progress : float
        Share of the steps after the warm-up that are done.
    floor : float
        Share of the peak at the end, from 0 to 1.
    """
    return _above(floor, 1 - progress)


@register_learning_rate("cosine")
def cosine(step: int, progress: float, *, floor: float = 0.0) -> float:
    """Fall along half a cosine from the peak to the floor (Loshchilov, Hutter: SGDR, 2017).

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    progress : float
        Share of the steps after the warm-up that are done.
    floor : float
        Share of the peak at the end, from 0 to 1.
    """
    return _above(floor, _half_cosine(progress))


@register_learning_rate("polynomial")
def polynomial(step: int, progress: float, *, floor: float = 0.0, power: float = 1.0) -> float:
    """Fall from the peak to the floor with a power of the share of steps that is left.

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    progress : float
        Share of the steps after the warm-up that are done.
    floor : float
        Share of the peak at the end, from 0 to 1.
    power : float
        The power, 0 or more.
    """
    if power < 0:
        raise OptionError(f"learning rate 'polynomial': power={power} must be 0 or more")
    return _above(floor, (1 - progress) ** power)


@register_learning_rate("wsd")
def warmup_stable_decay(step: int, progress: float, *, floor: float = 0.0, decay: float = 0.2) -> float:
    """Stay at the peak, then fall along a line to the floor in the last steps (Hu et al.: MiniCPM, 2024).

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    progress : float
        Share of the steps after the warm-up that are done.
    floor : float
        Share of the peak at the end, from 0 to 1.
    decay : float
        Share of the steps after the warm-up in which the rate falls, above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise OptionError(f"learning rate 'wsd': decay={decay} must be above 0 and at most 1")
    return _above(floor, min(1.0, (1 - progress) / decay))


@register_learning_rate("multi-step")
def multi_step(step: int, progress: float, *, milestones: tuple[int, ...] = (), gamma: float = 0.1) -> float:
    """Multiply the rate by a factor at each milestone.

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    progress : float
        Share of the steps after the warm-up that are done.
    milestones : tuple of int
        Steps from each of which on the rate is multiplied once more.
    gamma : float
        The factor.
    """
    return gamma ** sum(step >= milestone for milestone in milestones)


@register_learning_rate("one-cycle", warmup=cosine_warmup)
def one_cycle(step: int, progress: float, *, floor: float = 0.0) -> float:
    """Rise and fall along half a cosine each, from 1/25 of the peak (Smith, Topin: Super-convergence, 2018).

    Parameters
    ----------
    step : int
        Number of the step, from 0.
    progress : float
        Share of the steps after the warm-up that are done.
    floor : float
        Share of the peak at the end, from 0 to 1.
    """
    return _above(floor, _half_cosine(progress))
