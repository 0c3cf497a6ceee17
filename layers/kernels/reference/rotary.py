"""Rotary position embedding: each pair of a head's components turns by an angle that grows with the position.

The layer `Rotation` calls it for queries and keys.
"""

from __future__ import annotations

from colossal_mpi.layers.kernels.reference.wide import in_wide
from colossal_mpi.platform.backend import Block, namespace


@in_wide
def rotate(x: Block, cos: Block, sin: Block) -> Block:
    """Turn the pairs (i, i + d/2) of each head's components, as Llama and Hugging Face pair them.

    Parameters
    ----------
    x : array
        Heads ``[b, s, ..., d]``.
    cos : array
        Cosines ``[s, d/2]`` or ``[b, s, d/2]`` of the angles.
    sin : array
        Sines of the angles in the same shape. With ``-sin`` the function is its own adjoint and inverse.

    Returns
    -------
    array
        Turned heads in the shape and dtype of `x`.

    References
    ----------
    Su et al.: RoFormer: enhanced transformer with rotary position embedding, 2021.
    """
    xp, half = namespace(x), x.shape[-1] // 2
    shape = (*((1, *cos.shape) if cos.ndim == 2 else cos.shape),)
    shape = (*shape[:2], *[1] * (x.ndim - 3), half)
    cos, sin = xp.reshape(cos, shape), xp.reshape(sin, shape)
    first, second = x[..., :half], x[..., half:]
    return xp.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)
