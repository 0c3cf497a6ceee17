"""The reference kernels: each formula once, in the array API, for any array library and float dtype.

``layers.kernels`` offers them to the layers and takes from here what another provider lacks; nothing else imports them.
They know of no ranks: where a sum goes over a dim that may be cut, a function takes it or returns this rank's part.
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
    tanh,
    tanh_backward,
)
from colossal_mpi.layers.kernels.reference.attention import attention, attention_backward, attention_merge
from colossal_mpi.layers.kernels.reference.image import (
    fold,
    max_pool,
    max_pool_backward,
    mean_pool,
    mean_pool_backward,
    unfold,
    windows,
)
from colossal_mpi.layers.kernels.reference.loss import (
    cross_entropy_backward,
    cross_entropy_losses,
    cross_entropy_sums,
    peak,
)
from colossal_mpi.layers.kernels.reference.norm import norm, norm_backward
from colossal_mpi.layers.kernels.reference.rotary import rotate
from colossal_mpi.layers.kernels.reference.routing import (
    fill_slots,
    match_slots,
    route,
    route_backward,
    routing_sums,
    sort_by_expert,
    take_slots,
)
from colossal_mpi.layers.kernels.reference.table import lookup, lookup_backward, require_ids
from colossal_mpi.layers.kernels.reference.update import adam, adamw

__all__ = [
    "adam",
    "adamw",
    "attention",
    "attention_backward",
    "attention_merge",
    "cross_entropy_backward",
    "cross_entropy_losses",
    "cross_entropy_sums",
    "fill_slots",
    "fold",
    "gelu",
    "gelu_backward",
    "gelu_erf",
    "gelu_erf_backward",
    "lookup",
    "lookup_backward",
    "match_slots",
    "max_pool",
    "max_pool_backward",
    "mean_pool",
    "mean_pool_backward",
    "norm",
    "norm_backward",
    "peak",
    "relu",
    "relu_backward",
    "require_ids",
    "rotate",
    "route",
    "route_backward",
    "routing_sums",
    "silu",
    "silu_backward",
    "sort_by_expert",
    "take_slots",
    "tanh",
    "tanh_backward",
    "unfold",
    "windows",
]
