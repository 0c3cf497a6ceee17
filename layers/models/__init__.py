"""Models, each written once for every mode."""

from colossal_mpi.layers.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
