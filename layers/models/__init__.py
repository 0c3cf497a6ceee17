"""Models, each written once for every mode."""

from colossal_mpi.layers.models.bert import Bert, BertConfig
from colossal_mpi.layers.models.gpt import GPT, GPTConfig
from colossal_mpi.layers.models.kinds import describe, make
from colossal_mpi.layers.models.llama import Llama, LlamaConfig
from colossal_mpi.layers.models.pretrained import from_pretrained, save_pretrained
from colossal_mpi.layers.models.vit import ViT, ViTConfig

__all__ = [
    "GPT",
    "Bert",
    "BertConfig",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "ViT",
    "ViTConfig",
    "describe",
    "from_pretrained",
    "make",
    "save_pretrained",
]
