"""Models, each written once for every mode."""

from colossal_mpi.layers.models.gpt import GPT, GPTConfig
from colossal_mpi.layers.models.vit import ViT, ViTConfig

__all__ = ["GPT", "GPTConfig", "ViT", "ViTConfig"]
