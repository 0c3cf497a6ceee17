"""Rotary positions: each pair of a head's components turned by an angle that grows with the position."""

from __future__ import annotations

from colossal_mpi.layers.kernels.reference.wide import in_wide
from colossal_mpi.platform.backend import Block, namespace


@in_wide
def rotate(x: Block, cos: Block, sin: Block) -> Block:
    """Return ``[b, s, ..., d]`` with the pairs (i, i + d/2) turned, as Llama and Hugging Face pair them.

    Parameters
    ----------
    x : array, ``[b, s, ..., d]``
    cos, sin : array, ``[s, d/2]`` or ``[b, s, d/2]``
        Of the angles. With ``-sin`` it is the adjoint, which is the inverse.
    """
    xp, half = namespace(x), x.shape[-1] // 2
    shape = (*((1, *cos.shape) if cos.ndim == 2 else cos.shape),)
    shape = (*shape[:2], *[1] * (x.ndim - 3), half)
    cos, sin = xp.reshape(cos, shape), xp.reshape(sin, shape)
    first, second = x[..., :half], x[..., half:]
    return xp.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)
