"""Optimizers: each rank updates the blocks that it stores."""

from collections.abc import Callable

from colossal_mpi.layers.optim.adafactor import Adafactor
from colossal_mpi.layers.optim.adam import LAMB, AdamW
from colossal_mpi.layers.optim.average import MovingAverage
from colossal_mpi.layers.optim.base import Group, Optimizer, gradient_norm
from colossal_mpi.layers.optim.muon import Muon
from colossal_mpi.layers.optim.sgd import LARS, SGD

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "lamb": LAMB,
    "lars": LARS,
    "adafactor": Adafactor,
    "muon": Muon,
}
"""Optimizers by the names that configurations give them."""

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Group",
    "MovingAverage",
    "Muon",
    "Optimizer",
    "gradient_norm",
]
