"""Neural-network layers with manual backward passes, each written once for all parallel modes.

The command line, the configuration and the tasks of `colossal_mpi.apps` import what they need from here, and so do
users' own models; the subpackages (models, optimizers, pipelines, overlap, inference) import its modules. The layers
call distributed products and redistributions to move data, and the kernels of their grid for local work: a parallel
mode is a choice of layouts.
"""

from colossal_mpi.layers.activation import GELU, Gated, ReLU, SiLU, Softmax
from colossal_mpi.layers.attention import Attention, GroupedAttention, HeadNorm, Rotary, Rotation, SelfAttention
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.containers import FanOut, Parallel, Residual, Sequential
from colossal_mpi.layers.context import AuxiliaryLosses, Context, Decoding
from colossal_mpi.layers.conv import Conv2d, PatchEmbedding
from colossal_mpi.layers.dropout import Dropout, DropPath
from colossal_mpi.layers.embedding import Embedding, PositionEmbedding, SegmentEmbedding
from colossal_mpi.layers.inference import generate
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.linear import Linear, Linears
from colossal_mpi.layers.lora import LowRank, add_adapters, merge_adapters
from colossal_mpi.layers.loss import CrossEntropy, MeanSquaredError, backpropagate, count_correct
from colossal_mpi.layers.mlp import MLP
from colossal_mpi.layers.moe import MoE
from colossal_mpi.layers.norm import LayerNorm, RMSNorm
from colossal_mpi.layers.optim import LAMB, LARS, SGD, Adafactor, AdamW, Muon
from colossal_mpi.layers.parallelism import (
    INNER,
    MODES,
    SEQUENCE_MODES,
    Mode,
    Parallelism,
    SequenceMode,
    Template,
    register_mode,
    register_sequence_mode,
    require_axes,
)
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.pooling import AvgPool2d, ClassifierHead, FirstPool, MaxPool2d, MeanPool
from colossal_mpi.layers.recompute import Recompute, recompute

__all__ = [
    "GELU",
    "INNER",
    "LAMB",
    "LARS",
    "MLP",
    "MODES",
    "SEQUENCE_MODES",
    "SGD",
    "Adafactor",
    "AdamW",
    "Attention",
    "AuxiliaryLosses",
    "AvgPool2d",
    "ClassifierHead",
    "Context",
    "Conv2d",
    "CrossEntropy",
    "Decoding",
    "DropPath",
    "Dropout",
    "Embedding",
    "FanOut",
    "FirstPool",
    "Gated",
    "GroupedAttention",
    "HeadNorm",
    "Layer",
    "LayerNorm",
    "Linear",
    "Linears",
    "LowRank",
    "MaxPool2d",
    "MeanPool",
    "MeanSquaredError",
    "MoE",
    "Mode",
    "Muon",
    "Parallel",
    "Parallelism",
    "Parameter",
    "PatchEmbedding",
    "PositionEmbedding",
    "RMSNorm",
    "ReLU",
    "Recompute",
    "Residual",
    "Rotary",
    "Rotation",
    "SegmentEmbedding",
    "SelfAttention",
    "SequenceMode",
    "Sequential",
    "SiLU",
    "Softmax",
    "Template",
    "TransformerBlock",
    "add_adapters",
    "backpropagate",
    "count_correct",
    "generate",
    "merge_adapters",
    "recompute",
    "register_mode",
    "register_sequence_mode",
    "require_axes",
]
