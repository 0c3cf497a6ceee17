"""Elementwise formulas."""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace

_GELU = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def gelu(x: Block) -> Block:
    """Return the tanh form of GELU (Hendrycks & Gimpel 2016)."""
    xp = namespace(x)
    t = x * x
    t *= _GELU * _CUBIC
    t += _GELU
    t *= x
    t = xp.tanh(t)
    t += 1.0
    t *= x
    t *= 0.5
    return t


def gelu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `gelu`."""
    xp = namespace(x)
    square = x * x
    t = (_GELU * _CUBIC) * square
    t += _GELU
    t *= x
    t = xp.tanh(t)
    square *= 3.0 * _GELU * _CUBIC
    square += _GELU
    square *= x
    slope = t * t
    slope -= 1.0
    slope *= square
    slope = xp.subtract(t, slope)
    slope += 1.0
    slope *= dy
    slope *= 0.5
    return slope
