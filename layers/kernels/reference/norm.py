"""Normalisation, its sums made elsewhere."""

from __future__ import annotations

from colossal_mpi.backend import Block


def normalise(x: Block, mean: Block | None, rstd: Block) -> Block:
    """Return ``(x - mean) rstd`` with statistics per leading index; without mean for root-mean-square forms."""
    if mean is None:
        return x * rstd[..., None]
    y = x - mean[..., None]
    y *= rstd[..., None]
    return y


def normalise_backward(dy: Block, y: Block, rstd: Block, sums: Block, n: int) -> Block:
    """Return the cotangent of the input of a normalisation before gain and bias.

    Parameters
    ----------
    dy, y : array, ``[..., h]``
        Cotangent and value of the normalised array.
    rstd : array, ``[...]``
    sums : array, ``[2, ...]`` or ``[1, ...]``
        Sums over the whole of h: of `dy` where a mean was subtracted, and of ``dy * y``.
    n : int
        The whole of h.
    """
    dx = dy - y * (sums[-1, ...] / n)[..., None]
    if sums.shape[0] == 2:
        dx -= (sums[0, ...] / n)[..., None]
    dx *= rstd[..., None]
    return dx
