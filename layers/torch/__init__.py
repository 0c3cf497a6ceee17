"""Conversions between PyTorch and our layers: a layer as a ``torch.nn.Module``, and layers made of torch modules.

User programs that keep their PyTorch training loop call `as_module`, `from_module` and `clip_grad_norm_`. Tensors share
memory with our blocks by ``dlpack``; torch is imported when one of these names is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_mpi.layers.torch.conversion import from_module
    from colossal_mpi.layers.torch.module import LayerModule, as_module, clip_grad_norm_

__all__ = ["LayerModule", "as_module", "clip_grad_norm_", "from_module"]

_MODULES = {"LayerModule": "module", "as_module": "module", "clip_grad_norm_": "module", "from_module": "conversion"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
