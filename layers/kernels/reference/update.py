"""What optimizers do to the blocks that a rank stores, in place."""

from __future__ import annotations

import math

from colossal_mpi.backend import Block, namespace


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
    scale: float = 1.0,
) -> None:
    """Update a weight and its moments by a gradient, which stays as it is.

    Parameters
    ----------
    w, g, m, v : array
        Weight, gradient, first and second moment.
    step : int
        Number of this step, from 1.
    lr, eps, weight_decay : float
    betas : (float, float)
    scale : float
        Factor of the gradient, by which it is clipped.

    References
    ----------
    Loshchilov, Hutter: Decoupled weight decay regularization, 2019.
    """
    b1, b2 = betas
    m *= b1
    m += ((1 - b1) * scale) * g
    square = g * g
    square *= (1 - b2) * scale**2
    v *= b2
    v += square
    # m / c1 / (sqrt(v / c2) + eps), with the corrections of the bias where they cost no pass over the block
    correction = math.sqrt(1 - b2**step)
    root = namespace(w).sqrt(v)
    root += eps * correction
    change = m / root
    change *= lr * correction / (1 - b1**step)
    w *= 1 - lr * weight_decay
    w -= change
