"""Elementwise formulas."""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace

_GELU = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def gelu(x: Block) -> Block:
    """Return the tanh form of GELU (Hendrycks & Gimpel 2016)."""
    xp = namespace(x)
    t = xp.tanh(_GELU * (x + _CUBIC * (x * x * x)))
    t += 1.0
    t *= x
    t *= 0.5
    return t


def gelu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `gelu`."""
    xp = namespace(x)
    square = x * x
    t = xp.tanh(_GELU * x * (1.0 + _CUBIC * square))
    slope = 1.0 - t * t
    slope *= x
    slope *= _GELU * (1.0 + 3.0 * _CUBIC * square)
    slope += t
    slope += 1.0
    slope *= dy
    slope *= 0.5
    return slope
