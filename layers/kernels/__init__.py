"""Local maths of the layers. Layers say ``kernels.gelu(x)`` and get the formula of the provider in use.

`reference` has each formula once, in the array API. `torch` has PyTorch's kernels on the same memory, and the
reference's formula for the rest. `use` names the provider, for all layers of the process. Until then it is the
reference, and nothing imports torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from colossal_mpi import comm
from colossal_mpi.errors import OptionError
from colossal_mpi.grid import Grid
from colossal_mpi.layers.kernels import reference

PROVIDERS = ("auto", "reference", "torch")

_active: Any = reference


def use(provider: str, grid: Grid | None = None) -> str:
    """Take all kernels from `provider` from now on, and return the name of the one that is taken.

    Parameters
    ----------
    provider : {"auto", "reference", "torch"}
        With ``"auto"`` PyTorch's kernels where it is installed, else the reference.
    grid : Grid, optional
        Whose ranks decide together: replicas stay equal to the bit only if all have them from one provider. Planned
        grids have kernels of their own.

    **Communication:** with a grid, one gather of a flag.

    Raises
    ------
    OptionError
        If there is no such provider, or ``"torch"`` is asked for where it cannot be imported.
    """
    global _active
    if provider not in PROVIDERS:
        raise OptionError(f"kernels={provider!r}: use one of {', '.join(map(repr, PROVIDERS))}")
    if grid is not None and grid.is_meta:
        _active = importlib.import_module(f"{__name__}.planned")
        return provider
    reason = None if provider == "reference" else _missing()
    reasons = [reason] if grid is None else comm.collect(reason, grid)
    lacking = next((text for text in reasons if text is not None), None)
    if provider == "torch" and lacking is not None:
        raise OptionError(
            f"kernels='torch': PyTorch cannot be imported ({lacking}): install the extra 'torch', or use 'auto'"
        )
    taken = "reference" if provider == "reference" or lacking is not None else "torch"
    _active = importlib.import_module(f"{__name__}.{taken}")
    return taken


@contextmanager
def as_planned() -> Iterator[None]:
    """Take the kernels of meta grids until the context ends."""
    global _active
    before, _active = _active, importlib.import_module(f"{__name__}.planned")
    try:
        yield
    finally:
        _active = before


def _missing() -> str | None:
    """Return why PyTorch's kernels are not there, None if they are."""
    if importlib.util.find_spec("torch") is None:
        return "it is not installed"
    try:
        importlib.import_module(f"{__name__}.torch")
    except (ImportError, OSError) as problem:  # OSError: a library that it is built for is not there
        return str(problem).splitlines()[0]
    return None


def __getattr__(name: str) -> Any:
    return getattr(_active, name)
