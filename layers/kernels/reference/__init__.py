"""Each formula once, in the array API: any library, any float dtype. Nothing here knows of ranks.

Sums over a dim that may be cut are left to the layer: a function that needs one takes it or returns its local part.
"""

from colossal_mpi.layers.kernels.reference.activation import gelu, gelu_backward
from colossal_mpi.layers.kernels.reference.attention import attention, attention_backward, attention_merge
from colossal_mpi.layers.kernels.reference.image import fold, unfold, windows
from colossal_mpi.layers.kernels.reference.loss import (
    cross_entropy_backward,
    cross_entropy_losses,
    cross_entropy_sums,
    peak,
)
from colossal_mpi.layers.kernels.reference.norm import normalise, normalise_backward
from colossal_mpi.layers.kernels.reference.rotary import rotate
from colossal_mpi.layers.kernels.reference.table import lookup, lookup_backward, require_ids

__all__ = [
    "attention",
    "attention_backward",
    "attention_merge",
    "cross_entropy_backward",
    "cross_entropy_losses",
    "cross_entropy_sums",
    "fold",
    "gelu",
    "gelu_backward",
    "lookup",
    "lookup_backward",
    "normalise",
    "normalise_backward",
    "peak",
    "require_ids",
    "rotate",
    "unfold",
    "windows",
]
