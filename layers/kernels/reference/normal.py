"""The distribution function and the density of the standard normal, for GELU: the array API has no error function."""

from __future__ import annotations

import math

import numpy as np

from colossal_mpi.platform.backend import Block, namespace, numpy_dtype

_CENTRE = 2.5
_TAIL = (
    1.1771189339755783,
    0.01421274082732332,
    -0.10037710257743795,
    0.04838422197495771,
    -0.012607425531069104,
    0.0016421555334706595,
    5.2927052289800504e-05,
    -5.106088378409827e-05,
    2.371428558502003e-06,
    1.5839410905182581e-06,
    -1.2483958211750847e-07,
    -6.04565732133604e-08,
    4.0925941245210135e-09,
    2.7374094237187243e-09,
    -4.5886933716003754e-11,
    -1.3187750369729465e-10,
    -8.268090806120331e-12,
    5.9379251241790284e-12,
    1.0596357288540175e-12,
    -1.9892259921437084e-13,
    -8.474653109110982e-14,
    -2.518334370166951e-16,
    4.974971993791261e-15,
    7.988345428788568e-16,
    -1.7595071895673927e-16,
)
"""Chebyshev coefficients of ``(1 + 2 z) exp(z^2) erfc(z)`` in ``t = (z - 2.5) / (z + 2.5)``, for z of 0 and more.

They come from interpolation at 60 points in 40 digits. Shepherd & Laframboise (1981) gave this form of erfc.
"""
_POWERS = {
    8: [float(c) for c in np.polynomial.chebyshev.cheb2poly(_TAIL)],
    4: [float(c) for c in np.polynomial.chebyshev.cheb2poly(_TAIL[:11])],
}
"""Coefficients of the powers of t for floats of 8 and of 4 bytes, as many as their precision can tell apart."""


def normal_cdf(x: Block) -> Block:
    """Return the distribution function of the standard normal, ``(1 + erf(x / sqrt 2)) / 2``.

    The error is two units of the last place, absolutely; in the lower tail it is ``(1 + x^2 / 2)`` times that,
    relatively.

    References
    ----------
    Shepherd, Laframboise: Chebyshev approximation of (1 + 2x) exp(x^2) erfc x, Mathematics of Computation, 1981.
    """
    xp, powers = namespace(x), _POWERS[8 if numpy_dtype(x.dtype).itemsize == 8 else 4]
    size = xp.clip(xp.abs(x), max=40.0)  # beyond it the tail is 0 in float64, too
    z = size * math.sqrt(0.5)
    t = (z - _CENTRE) / (z + _CENTRE)
    tail = powers[-1] * t
    for power in powers[-2:0:-1]:
        tail += power
        tail *= t
    tail += powers[0]
    tail /= 1.0 + 2.0 * z
    tail *= 0.5
    tail *= _exp_half_square(size)
    return xp.where(x < 0, tail, 1.0 - tail)


def _exp_half_square(x: Block) -> Block:
    """Return ``exp(-x^2 / 2)``, without the square of ``x / sqrt 2``, which would double the error."""
    square = x * x
    square *= -0.5
    return namespace(x).exp(square)


def normal_pdf(x: Block) -> Block:
    """Return the density of the standard normal."""
    y = _exp_half_square(x)
    y *= math.sqrt(0.5 / math.pi)
    return y
