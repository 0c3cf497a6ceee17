"""Self-attention on any grid: a tensor axis cuts the heads, and a ring or Ulysses cuts the sequence.

The transformer block and the models build these layers. They call the attention kernels of the grid for blocks, and
send keys and values round the ring with ``comm``.
"""

from colossal_mpi.layers.attention.head_norm import HeadNorm
from colossal_mpi.layers.attention.rotary import Rotary, Rotation
from colossal_mpi.layers.attention.self_attention import Attention, GroupedAttention, SelfAttention, head_width

__all__ = ["Attention", "GroupedAttention", "HeadNorm", "Rotary", "Rotation", "SelfAttention", "head_width"]
