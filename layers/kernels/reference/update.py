"""What optimizers do to the blocks that a rank stores, in place."""

from __future__ import annotations

import math

from colossal_mpi.platform.backend import Block, namespace


def adam(g: Block, m: Block, v: Block, step: int, betas: tuple[float, float], eps: float) -> Block:
    """Update the moments by a gradient and return the corrected first over the root of the corrected second.

    Parameters
    ----------
    g, m, v : array
        Gradient, which stays as it is, first and second moment.
    step : int
        Number of this step, from 1.
    betas : (float, float)
    eps : float
        Added to the root.

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
    # m / c1 / (sqrt(v / c2) + eps), with the corrections where they cost no pass over the block
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
    """Step a weight by `adam`, after a decay that is no part of the gradient (Loshchilov & Hutter 2019)."""
    direction = adam(g, m, v, step, betas, eps)
    direction *= lr
    w *= 1 - lr * weight_decay
    w -= direction
