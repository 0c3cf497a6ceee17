"""Local maths of the layers. Layers say ``kernels.gelu(x)`` and get the formula of the provider in use.

`reference` has each formula once, in the array API. `use` names the provider, for all layers of the process.
"""

from __future__ import annotations

from typing import Any

from colossal_mpi.errors import OptionError
from colossal_mpi.layers.kernels import reference

_providers = {"reference": reference}
_active: Any = reference


def use(provider: str) -> None:
    """Take all kernels from `provider` from now on.

    Raises
    ------
    OptionError
        If there is no such provider.
    """
    global _active
    if provider not in _providers:
        raise OptionError(f"kernels={provider!r}: use one of {', '.join(map(repr, _providers))}")
    _active = _providers[provider]


def __getattr__(name: str) -> Any:
    return getattr(_active, name)
