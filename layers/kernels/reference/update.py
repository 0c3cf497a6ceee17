"""Update formulas of Adam, in place on the blocks that a rank stores, called by the optimizers."""

from __future__ import annotations

import math

from colossal_mpi.platform.backend import Block, namespace


def adam(g: Block, m: Block, v: Block, step: int, betas: tuple[float, float], eps: float) -> Block:
    """Update the moments by a gradient, and return the direction of Adam's step.

    Parameters
    ----------
    g : array
        Gradient. It stays as it is.
    m : array
        First moment, updated in place.
    v : array
        Second moment, updated in place.
    step : int
        Number of this step, from 1.
    betas : pair of float
        Shares of the old first and second moment that are kept.
    eps : float
        Number that is added to the root of the second moment.

    Returns
    -------
    array
        ``m' / (sqrt(v') + eps)`` with the moments corrected for their start at zero.

    References
    ----------
    Kingma, Ba: Adam: a method for stochastic optimization, 2015.
    """
    b1, b2 = betas
    m *= b1
    m += (1 - b1) * g
    square = g * g
    square *= 1 - b2
    v *= b2
    v += square
    # m / c1 / (sqrt(v / c2) + eps): the corrections are applied to scalars, which spares a pass over the block
    correction = math.sqrt(1 - b2**step)
    root = namespace(g).sqrt(v)
    root += eps * correction
    direction = m / root
    direction *= correction / (1 - b1**step)
    return direction


def adamw(
    w: Block,
    g: Block,
    m: Block,
    v: Block,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update a weight by Adam's step, after a decay that is not part of the gradient.

    Parameters
    ----------
    w : array
        Weight, updated in place.
    g : array
        Gradient. It stays as it is.
    m : array
        First moment, updated in place.
    v : array
        Second moment, updated in place.
    step : int
        Number of this step, from 1.
    lr : float
        Learning rate.
    betas : pair of float
        Shares of the old first and second moment that are kept.
    eps : float
        Number that is added to the root of the second moment.
    weight_decay : float
        Decay: the weight is multiplied by ``1 - lr weight_decay``.

    References
    ----------
    Loshchilov, Hutter: Decoupled weight decay regularization, 2019.
    """
    direction = adam(g, m, v, step, betas, eps)
    direction *= lr
    w *= 1 - lr * weight_decay
    w -= direction
