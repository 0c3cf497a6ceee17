"""Training: the tasks, the trainer, the loop with its progress, metrics and traces, and the models that it has saved.

The commands ``train``, ``generate`` and ``convert``, the demo, the planner and the benchmark of optimizers call it. It
builds a model from a configuration, steps it through ``layers.pipeline`` and saves it with ``checkpoint``.
"""

from colossal_mpi.apps.training.saved import (
    checkpoint_of,
    load_model,
    load_weights,
    metadata_of,
    model_of,
    settings_of,
    weights_by_name,
)
from colossal_mpi.apps.training.train import make_grid, resume, start
from colossal_mpi.apps.training.trainer import Trainer

__all__ = [
    "Trainer",
    "checkpoint_of",
    "load_model",
    "load_weights",
    "make_grid",
    "metadata_of",
    "model_of",
    "resume",
    "settings_of",
    "start",
    "weights_by_name",
]
