"""Elementwise functions and their derivatives, called by the activation layers.

16-bit floats are computed in float32 and rounded once.
"""

from __future__ import annotations

import math

from colossal_mpi.layers.kernels.reference.normal import normal_cdf, normal_pdf
from colossal_mpi.layers.kernels.reference.wide import in_wide
from colossal_mpi.platform.backend import Block, namespace

_GELU = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


@in_wide
def gelu(x: Block) -> Block:
    """Return the tanh form of GELU, ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``.

    Parameters
    ----------
    x : array
        Block of any shape and float dtype.

    Returns
    -------
    array
        Array of the shape and dtype of `x`.

    References
    ----------
    Hendrycks, Gimpel: Gaussian error linear units, 2016.
    """
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
    """Return the cotangent of the input of `gelu`.

    Parameters
    ----------
    dy : array
        Cotangent of the result of `gelu`.
    x : array
        Input of `gelu`.

    Returns
    -------
    array
        Cotangent of `x`, in its shape and dtype.
    """
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
    """Return the exact GELU: x times the distribution function of the standard normal.

    Parameters
    ----------
    x : array
        Block of any shape and float dtype.

    Returns
    -------
    array
        Array of the shape and dtype of `x`.

    References
    ----------
    Hendrycks, Gimpel: Gaussian error linear units, 2016.
    """
    y = normal_cdf(x)
    y *= x
    return y


@in_wide
def gelu_erf_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `gelu_erf`.

    Parameters
    ----------
    dy : array
        Cotangent of the result of `gelu_erf`.
    x : array
        Input of `gelu_erf`.

    Returns
    -------
    array
        Cotangent of `x`, in its shape and dtype.
    """
    slope = normal_pdf(x)
    slope *= x
    slope += normal_cdf(x)
    slope *= dy
    return slope


def sigmoid(x: Block) -> Block:
    """Return ``1 / (1 + exp(-x))``, computed by tanh, which cannot overflow."""
    s = namespace(x).tanh(0.5 * x)
    s += 1.0
    s *= 0.5
    return s


@in_wide
def silu(x: Block) -> Block:
    """Return ``x sigmoid(x)``, also called swish.

    Parameters
    ----------
    x : array
        Block of any shape and float dtype.

    Returns
    -------
    array
        Array of the shape and dtype of `x`.

    References
    ----------
    Elfwing, Uchibe, Doya: Sigmoid-weighted linear units, 2017.
    """
    y = sigmoid(x)
    y *= x
    return y


@in_wide
def silu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `silu`: dy times ``s (1 + x (1 - s))`` with s the sigmoid of x.

    Parameters
    ----------
    dy : array
        Cotangent of the result of `silu`.
    x : array
        Input of `silu`.

    Returns
    -------
    array
        Cotangent of `x`, in its shape and dtype.
    """
    s = sigmoid(x)
    slope = 1.0 - s
    slope *= x
    slope += 1.0
    slope *= s
    slope *= dy
    return slope


def relu(x: Block) -> Block:
    """Return the positive part of each element.

    Parameters
    ----------
    x : array
        Block of any shape and float dtype.

    Returns
    -------
    array
        Array of the shape and dtype of `x`.
    """
    return namespace(x).clip(x, min=0.0)


def relu_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `relu`, whose slope at 0 is 0.

    Parameters
    ----------
    dy : array
        Cotangent of the result of `relu`.
    x : array
        Input of `relu`.

    Returns
    -------
    array
        Cotangent of `x`, in its shape and dtype.
    """
    return dy * namespace(x).astype(x > 0, dy.dtype)


@in_wide
def tanh(x: Block) -> Block:
    """Return the hyperbolic tangent of each element.

    Parameters
    ----------
    x : array
        Block of any shape and float dtype.

    Returns
    -------
    array
        Array of the shape and dtype of `x`.
    """
    return namespace(x).tanh(x)


@in_wide
def tanh_backward(dy: Block, x: Block) -> Block:
    """Return the cotangent of the input of `tanh`.

    Parameters
    ----------
    dy : array
        Cotangent of the result of `tanh`.
    x : array
        Input of `tanh`.

    Returns
    -------
    array
        Cotangent of `x`, in its shape and dtype.
    """
    slope = tanh(x)
    slope *= -slope
    slope += 1.0
    slope *= dy
    return slope
