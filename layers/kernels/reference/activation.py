"""Elementwise formulas; those of 16-bit floats are computed in float32 and rounded once."""

from __future__ import annotations

import math

from colossal_mpi.layers.kernels.reference.normal import normal_cdf, normal_pdf
from colossal_mpi.layers.kernels.reference.wide import in_wide
from colossal_mpi.platform.backend import Block, namespace

_GELU = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


@in_wide
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


@in_wide
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


@in_wide
def gelu_erf(x: Block) -> Block:
    """Return GELU as it is defined, ``x`` times the distribution function of the normal (Hendrycks & Gimpel 2016)."""
    y = normal_cdf(x)
    y *= x
    return y


@in_wide
def gelu_erf_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `gelu_erf`."""
    slope = normal_pdf(x)
    slope *= x
    slope += normal_cdf(x)
    slope *= dy
    return slope


def sigmoid(x: Block) -> Block:
    """Return ``1 / (1 + exp(-x))``; by tanh, which cannot overflow."""
    s = namespace(x).tanh(0.5 * x)
    s += 1.0
    s *= 0.5
    return s


@in_wide
def silu(x: Block) -> Block:
    """Return ``x sigmoid(x)``, also called swish."""
    y = sigmoid(x)
    y *= x
    return y


@in_wide
def silu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `silu`: dy times ``s (1 + x (1 - s))``."""
    s = sigmoid(x)
    slope = 1.0 - s
    slope *= x
    slope += 1.0
    slope *= s
    slope *= dy
    return slope


def relu(x: Block) -> Block:
    """Return the positive part of `x`."""
    return namespace(x).clip(x, min=0.0)


def relu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `relu`, of slope 0 at 0."""
    return dy * namespace(x).astype(x > 0, dy.dtype)


@in_wide
def tanh(x: Block) -> Block:
    """Return the hyperbolic tangent."""
    return namespace(x).tanh(x)


@in_wide
def tanh_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `tanh`."""
    slope = tanh(x)
    slope *= -slope
    slope += 1.0
    slope *= dy
    return slope
