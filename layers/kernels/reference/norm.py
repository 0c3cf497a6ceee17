"""Normalisation, its sums made elsewhere."""

from __future__ import annotations

from colossal_mpi.backend import Block


def normalise(x: Block, mean: Block, rstd: Block) -> Block:
    """Return ``(x - mean) rstd`` with statistics per leading index."""
    y = x - mean[..., None]
    y *= rstd[..., None]
    return y


def normalise_backward(dy: Block, y: Block, rstd: Block, sums: Block, n: int) -> Block:
    """Return the cotangent of the input of a layer normalisation before gain and bias.

    Parameters
    ----------
    dy, y : array, ``[..., h]``
        Cotangent and value of the normalised array.
    rstd : array, ``[...]``
    sums : array, ``[2, ...]``
        Sums of `dy` and of ``dy * y`` over the whole of h.
    n : int
        The whole of h.
    """
    dx = dy - (sums[0, ...] / n)[..., None]
    dx -= y * (sums[1, ...] / n)[..., None]
    dx *= rstd[..., None]
    return dx
