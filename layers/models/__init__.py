"""The models, each written once for every tensor mode, and the registry that everything else finds them in.

``apps`` trains, saves and generates from them, and user programs construct them. They are chains of the layers of
``layers``; `from_pretrained` and `save_pretrained` exchange them with Hugging Face directories.
"""

from colossal_mpi.layers.models.bert import Bert, BertConfig
from colossal_mpi.layers.models.gpt import GPT, GPTConfig
from colossal_mpi.layers.models.huggingface.settings import end_tokens, find_settings, read_settings
from colossal_mpi.layers.models.limits import beyond_limits
from colossal_mpi.layers.models.llama import Llama, LlamaConfig
from colossal_mpi.layers.models.pretrained import from_pretrained, save_pretrained
from colossal_mpi.layers.models.registry import MODELS, ModelKind, describe, from_description, register_model
from colossal_mpi.layers.models.vit import ViT, ViTConfig

__all__ = [
    "GPT",
    "MODELS",
    "Bert",
    "BertConfig",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "ModelKind",
    "ViT",
    "ViTConfig",
    "beyond_limits",
    "describe",
    "end_tokens",
    "find_settings",
    "from_description",
    "from_pretrained",
    "read_settings",
    "register_model",
    "save_pretrained",
]
