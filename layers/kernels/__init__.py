"""Kernels: the local maths of the layers, which knows of no ranks, with a choice of providers for each grid.

Layers and optimizers call ``kernels.of(x.grid).gelu(x.local)``; the trainer chooses a provider with ``kernels.use``.
``kernels.reference`` has every formula once, in the array API; ``kernels.torch`` calls PyTorch on the same memory, and
``kernels.meta`` gives the shapes and the flop on meta grids.
"""

from colossal_mpi.layers.kernels.provider import (
    AUTO,
    PROVIDERS,
    Kernels,
    Provider,
    choices,
    load,
    of,
    register_provider,
    use,
)
from colossal_mpi.layers.kernels.reference.image import windows
from colossal_mpi.layers.kernels.reference.table import require_ids
from colossal_mpi.layers.kernels.reference.tiles import attention_scores
from colossal_mpi.layers.kernels.reference.wide import like, wide

__all__ = [
    "AUTO",
    "PROVIDERS",
    "Kernels",
    "Provider",
    "attention_scores",
    "choices",
    "like",
    "load",
    "of",
    "register_provider",
    "require_ids",
    "use",
    "wide",
    "windows",
]
