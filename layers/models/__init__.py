"""Models, each written once for every mode."""

from colossal_mpi.layers.models.gpt import GPT, GPTConfig
from colossal_mpi.layers.models.kinds import describe, make
from colossal_mpi.layers.models.pretrained import from_pretrained, save_pretrained

__all__ = ["GPT", "GPTConfig", "describe", "from_pretrained", "make", "save_pretrained"]
