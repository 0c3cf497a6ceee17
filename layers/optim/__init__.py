"""Optimizers, learning-rate schedules and moving averages of weights; each rank updates the blocks that it stores.

The trainer makes an optimizer and a schedule by their names in the registries and calls them after each step of the
pipeline. An optimizer reduces the gradients of its parameters and calls the update kernels of ``layers.kernels``; Muon
orthogonalises with ``linalg.factor``.
"""

from colossal_mpi.layers.optim.adafactor import Adafactor
from colossal_mpi.layers.optim.adam import LAMB, AdamW
from colossal_mpi.layers.optim.average import MovingAverage
from colossal_mpi.layers.optim.base import Group, Optimizer, gradient_norm
from colossal_mpi.layers.optim.learning_rate import (
    LEARNING_RATES,
    LearningRateKind,
    LearningRateSchedule,
    register_learning_rate,
)
from colossal_mpi.layers.optim.muon import Muon
from colossal_mpi.layers.optim.options import Option
from colossal_mpi.layers.optim.registry import OPTIMIZERS, OptimizerKind, register_optimizer
from colossal_mpi.layers.optim.sgd import LARS, SGD

__all__ = [
    "LAMB",
    "LARS",
    "LEARNING_RATES",
    "OPTIMIZERS",
    "SGD",
    "Adafactor",
    "AdamW",
    "Group",
    "LearningRateKind",
    "LearningRateSchedule",
    "MovingAverage",
    "Muon",
    "Optimizer",
    "OptimizerKind",
    "Option",
    "gradient_norm",
    "register_learning_rate",
    "register_optimizer",
]
