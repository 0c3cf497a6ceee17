"""Tasks: a model, its loss and its data, one file for each, registered by the kinds of models that they train.

The trainer, the planner and the commands make the task of a configuration here. Tasks read batches from ``apps.data``
and make their models with ``layers.models``.
"""

from colossal_mpi.apps.training.tasks.images import ImageClassification, ImageSection
from colossal_mpi.apps.training.tasks.language import CausalLanguage, LanguageSection
from colossal_mpi.apps.training.tasks.masked import MaskedLanguage, MaskedSection
from colossal_mpi.apps.training.tasks.task import (
    TASKS,
    Batch,
    StepFeed,
    Task,
    complete,
    make,
    make_model,
    register_section,
    register_task,
    sections,
)

__all__ = [
    "TASKS",
    "Batch",
    "CausalLanguage",
    "ImageClassification",
    "ImageSection",
    "LanguageSection",
    "MaskedLanguage",
    "MaskedSection",
    "StepFeed",
    "Task",
    "complete",
    "make",
    "make_model",
    "register_section",
    "register_task",
    "sections",
]
