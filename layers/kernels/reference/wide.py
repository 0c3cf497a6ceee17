"""Formulas on 16-bit floats, computed in float32 and rounded once. Kernels and layers call these functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from colossal_mpi.platform.backend import Block, is_half, namespace


def wide(x: Block) -> Block:
    """Return 16-bit floats as float32, in which they are summed, and any other value as it is.

    Parameters
    ----------
    x : array
        Block of any dtype.

    Returns
    -------
    array
        Float32 copy of 16-bit floats, or `x` itself.
    """
    if not hasattr(x, "dtype") or not is_half(x.dtype):
        return x
    xp = namespace(x)
    return xp.astype(x, xp.float32)


def like(x: Block, result: Block) -> Block:
    """Return an array in the dtype of another one.

    Parameters
    ----------
    x : array
        Array with the dtype.
    result : array
        Array of any shape.

    Returns
    -------
    array
        `result`, rounded to the dtype of `x` if it has another one.
    """
    return result if result.dtype == x.dtype else namespace(result).astype(result, x.dtype)


def in_wide(formula: Callable[..., Block]) -> Callable[..., Block]:
    """Return a formula that computes 16-bit floats in float32. Its result has the dtype of its first argument."""

    @wraps(formula)
    def kernel(x: Block, *others: Any, **options: Any) -> Block:
        if not is_half(x.dtype):
            return formula(x, *others, **options)
        return like(x, formula(wide(x), *map(wide, others), **options))

    return kernel
