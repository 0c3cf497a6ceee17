"""Matrices of random numbers of any dtype, and the check of a product of them that gathers nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import random
from colossal_mpi.layout import Box, box_shape

_CHUNK = 1 << 18  # elements made at a time: the generator's temporaries are several times as large
COLUMNS = 10
TOLERANCE = 20.0  # in units of eps; products of zero-mean numbers by plain BLAS come to 3 to 11


def fill(box: Box, shape: tuple[int, int], dtype: np.dtype, stream: str, order: Any = "C") -> np.ndarray:
    """Return the block at `box` of the global matrix of numbers in [-1/2, 1/2) of this name."""
    out = np.empty(box_shape(box), dtype, order)
    (start, stop), columns = box
    step = max(1, _CHUNK // max(1, columns[1] - columns[0]))
    for low in range(start, stop, step):
        piece = ((low, min(low + step, stop)), columns)
        values = out[low - start : low - start + step]
        values[...] = random.uniform_block(piece, shape, 0, stream) - 0.5
        if dtype.kind == "c":
            values += 1j * (random.uniform_block(piece, shape, 0, f"{stream} imaginary") - 0.5)
    return out


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a matrix, each element on one rank only."""

    block: np.ndarray
    rows: Any
    """Their global indices: a slice or an array."""
    columns: Any


def residual(pieces: tuple[Piece, Piece, Piece] | None, m: int, n: int, k: int, dtype: np.dtype) -> float:
    """Return ``||CX - A(BX)|| / ||A(BX)||`` in the Frobenius norm, in units of eps, for random X of +1 and -1.

    Parameters
    ----------
    pieces : three Pieces or None
        What this rank holds of A, B and C; None if it holds nothing.

    **Communication:** three allreduces of a thin matrix over all ranks, by MPI itself: nothing here is shared with the
    product that is checked.

    References
    ----------
    Freivalds: Probabilistic machines can use less running time, 1977.
    """
    a, b, c = pieces or (None, None, None)
    x = np.where(random.uniform_block(((0, n), (0, COLUMNS)), (n, COLUMNS), 0, "check") < 0.5, -1, 1).astype(dtype)
    y = _times(a, m, _times(b, k, x))
    difference, size = (float(np.linalg.norm(z)) for z in (_times(c, m, x) - y, y))
    eps = float(np.finfo(dtype).eps)
    return difference / (size * eps) if size else difference / eps


def _times(piece: Piece | None, rows: int, x: np.ndarray) -> np.ndarray:
    """Return the product of a matrix of that many rows and `x`, on every rank."""
    y = np.zeros((rows, x.shape[1]), x.dtype)
    if piece is not None:
        y[piece.rows] += piece.block @ x[piece.columns]
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, y)
    return y
