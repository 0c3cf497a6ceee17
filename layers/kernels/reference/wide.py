"""16-bit floats in formulas: computed in float32, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from colossal_mpi.platform.backend import Block, is_half, namespace


def wide(x: Block) -> Block:
    """Return 16-bit floats as float32, in which they are summed; anything else as it is."""
    if not hasattr(x, "dtype") or not is_half(x.dtype):
        return x
    xp = namespace(x)
    return xp.astype(x, xp.float32)


def like(x: Block, result: Block) -> Block:
    """Return `result` in the dtype of `x`."""
    return result if result.dtype == x.dtype else namespace(result).astype(result, x.dtype)


def in_wide(formula: Callable[..., Block]) -> Callable[..., Block]:
    """Do a formula of 16-bit floats in float32; its result has the dtype of its first argument."""

    @wraps(formula)
    def kernel(x: Block, *others: Any, **options: Any) -> Block:
        if not is_half(x.dtype):
            return formula(x, *others, **options)
        return like(x, formula(wide(x), *map(wide, others), **options))

    return kernel
