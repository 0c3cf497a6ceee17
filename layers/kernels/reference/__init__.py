"""Each formula once, in the array API: any library, any float dtype. Nothing here knows of ranks.

Sums over a dim that may be cut are left to the layer: a function that needs one takes it or returns its local part.
"""

from colossal_mpi.layers.kernels.reference.activation import (
    gelu,
    gelu_backward,
    gelu_erf,
    gelu_erf_backward,
    relu,
    relu_backward,
    silu,
    silu_backward,
)
from colossal_mpi.layers.kernels.reference.attention import attention, attention_backward
from colossal_mpi.layers.kernels.reference.image import fold, unfold, windows
from colossal_mpi.layers.kernels.reference.loss import (
    cross_entropy_backward,
    cross_entropy_losses,
    cross_entropy_sums,
    peak,
)
from colossal_mpi.layers.kernels.reference.norm import norm, norm_backward
from colossal_mpi.layers.kernels.reference.table import lookup, lookup_backward, require_ids
from colossal_mpi.layers.kernels.reference.update import adamw

__all__ = [
    "adamw",
    "attention",
    "attention_backward",
    "cross_entropy_backward",
    "cross_entropy_losses",
    "cross_entropy_sums",
    "fold",
    "gelu",
    "gelu_backward",
    "gelu_erf",
    "gelu_erf_backward",
    "lookup",
    "lookup_backward",
    "norm",
    "norm_backward",
    "peak",
    "relu",
    "relu_backward",
    "require_ids",
    "silu",
    "silu_backward",
    "unfold",
    "windows",
]
