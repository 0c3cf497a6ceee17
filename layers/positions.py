"""What the context says of tokens: their positions in their sequences, and which are padding."""

from __future__ import annotations

import numpy as np

from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import DTypeError, ShapeError
from colossal_mpi.layers.layer import Context
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def given_positions(ctx: Context, x: DistArray, whole: bool = False) -> Block | None:
    """Return the context's positions of this rank's part of ``x [b, s, ...]``, None if they are the indices.

    Parameters
    ----------
    ctx : Context
        Its positions, or, where it has none, its order of the sequence.
    x : DistArray
    whole : bool
        Return those of the whole sequence, of the samples of this rank's part.

    **Communication:** none for a whole array; a DistArray is redistributed to the cut of x.

    Raises
    ------
    ShapeError
        If they are neither ``[s]`` nor ``[b, s]``.
    DTypeError
        If they are no integers.
    """
    given = ctx.order if ctx.positions is None else ctx.positions
    if given is None:
        return None
    b, s = x.shape[:2]
    if not isinstance(given, DistArray):
        given = from_global(given, x.grid, Layout(*[None] * np.ndim(given)))
    if given.shape not in ((s,), (b, s)):
        raise ShapeError(f"positions must be of shape [s] = {[s]} or [b, s] = {[b, s]}; they are {list(given.shape)}")
    if backend.numpy_dtype(given.dtype).kind not in "iu":
        raise DTypeError(f"positions must be integers; they are {given.dtype}")
    cut = x.layout.dims[0], () if whole else x.layout.dims[1]
    return given.redistribute(Layout(*cut[2 - given.ndim :])).local


def given_mask(ctx: Context, x: DistArray, whole: bool = False) -> Block | None:
    """Return the context's mask of this rank's part of ``x [b, s, ...]``, None if all tokens count.

    Parameters
    ----------
    ctx : Context
    x : DistArray
    whole : bool
        Return that of the whole sequence, of the samples of this rank's part.

    **Communication:** none for a mask in the layout of `Parallelism.tokens`, unless it is gathered: a byte an element.

    Raises
    ------
    ShapeError
        If it is not ``[b, s]``.
    DTypeError
        If it is not bool.
    """
    given = ctx.mask
    if given is None:
        return None
    if given.shape != x.shape[:2]:
        raise ShapeError(
            f"the mask must be of shape [b, s] = {list(x.shape[:2])}, as its input; it is {list(given.shape)}"
        )
    if backend.numpy_dtype(given.dtype).kind != "b":
        raise DTypeError(f"the mask must be bool, true where a token counts; it is {given.dtype}")
    return given.redistribute(Layout(x.layout.dims[0], None if whole else x.layout.dims[1])).local
