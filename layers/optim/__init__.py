"""Optimizers: each rank updates the blocks that it stores."""

from colossal_mpi.layers.optim.adafactor import Adafactor
from colossal_mpi.layers.optim.adam import LAMB, AdamW
from colossal_mpi.layers.optim.average import MovingAverage
from colossal_mpi.layers.optim.base import Group, Optimizer, gradient_norm
from colossal_mpi.layers.optim.muon import Muon
from colossal_mpi.layers.optim.sgd import LARS, SGD
from colossal_mpi.layers.rates import warmup_cosine

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Group",
    "MovingAverage",
    "Muon",
    "Optimizer",
    "gradient_norm",
    "warmup_cosine",
]
