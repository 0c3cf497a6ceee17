"""Tasks: a model, its loss and its data, as the trainer takes them; one file for each kind."""

from colossal_mpi.apps.config.load import Config
from colossal_mpi.apps.training.tasks.images import ImageClassification
from colossal_mpi.apps.training.tasks.language import CausalLanguage
from colossal_mpi.apps.training.tasks.masked import MaskedLanguage
from colossal_mpi.apps.training.tasks.task import Batch, Task
from colossal_mpi.layers import Parallelism

__all__ = ["Batch", "Task", "make"]

KINDS: dict[str, type[Task]] = {
    "gpt": CausalLanguage,
    "llama": CausalLanguage,
    "bert": MaskedLanguage,
    "vit": ImageClassification,
}
"""The task of each ``model.kind``."""


def make(config: Config, parallelism: Parallelism) -> Task:
    """Return the task of a configuration; it reads its data, on rank 0, and makes its model."""
    return KINDS[config.model.kind](config, parallelism)
