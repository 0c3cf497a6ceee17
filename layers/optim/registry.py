"""The registry of optimizers: each class with its name, its description and its options.

The file of an optimizer registers its class with `register_optimizer`. The trainer makes an optimizer by its name, and
the configuration, the command line and the documentation list the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.optim.base import Group, Optimizer
from colossal_mpi.layers.optim.options import Option, options_of, summary
from colossal_mpi.layers.parameter import Parameter

_COMMON = frozenset({"lr", "weight_decay", "clip", "offload"})
"""The options that every optimizer takes; the training configuration has a key for each already."""


@dataclass(frozen=True)
class OptimizerKind:
    """An entry of the registry of optimizers. A call constructs the optimizer.

    Parameters
    ----------
    name : str
        Name in configurations, on the command line and in checkpoints.
    make : type of Optimizer
        Class of the optimizer.
    """

    name: str
    make: type[Optimizer]

    @property
    def description(self) -> str:
        """One sentence: the first line of the docstring of the class."""
        return summary(self.make)

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """The options of this optimizer alone by name, with their types, defaults and meanings.

        ``lr``, ``weight_decay``, ``clip`` and ``offload``, which every optimizer takes, are left out.
        """
        return options_of(self.make, _COMMON)

    def __call__(self, parameters: Iterable[Parameter | Group], **options: Any) -> Optimizer:
        return self.make(parameters, **options)


OPTIMIZERS: dict[str, OptimizerKind] = {}
"""The optimizers by the names that configurations give them."""

OptimizerClass = TypeVar("OptimizerClass", bound=type[Optimizer])


def register_optimizer(name: str) -> Callable[[OptimizerClass], OptimizerClass]:
    """Return a class decorator that registers an optimizer.

    The first line of the class's docstring describes it in help texts, and the keyword arguments of its constructor,
    with their defaults and their descriptions in the docstring, are its options in configurations.

    Parameters
    ----------
    name : str
        Name of the optimizer in configurations and on the command line.

    Returns
    -------
    callable
        Decorator that returns the class unchanged. It raises `OptionError` if another class has the name.

    Examples
    --------
    >>> @register_optimizer("signsgd")
    ... class SignSGD(Optimizer):
    ...     def __init__(self, parameters, lr=1e-4, weight_decay=0.0, clip=None, temperature: float = 1.0, **rest):
    ...         super().__init__(parameters, lr, clip, weight_decay, temperature=temperature, **rest)
    """

    def register(item: OptimizerClass) -> OptimizerClass:
        taken = OPTIMIZERS.get(name)
        if taken is not None and taken.make.__qualname__ != item.__qualname__:
            raise OptionError(f"register_optimizer({name!r}): {taken.make.__name__} has this name; choose another one")
        OPTIMIZERS[name] = OptimizerKind(name, item)
        return item

    return register
