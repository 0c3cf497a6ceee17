"""Rotary position embeddings: they rotate queries and keys by their positions, so that scores depend on distances.

The Llama models make a `Rotary`; `SelfAttention` puts a `Rotation` between its products and attention, which calls the
kernel ``rotate`` of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def _default(frequencies: np.ndarray) -> np.ndarray:
    return frequencies


def _linear(frequencies: np.ndarray, factor: float) -> np.ndarray:
    return frequencies / factor


def _llama3(frequencies: np.ndarray, factor: float, low: float, high: float, positions: float) -> np.ndarray:
    """Divide the frequencies that turn less than `low` times in the first `positions` by `factor`.

    Frequencies that turn more than `high` times stay as they are, and the ones between are blended.
    """
    turns = positions * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else np.where(turns > high, 1.0, 0.0)
    blended: np.ndarray = share * frequencies + (1.0 - share) * frequencies / factor
    return blended


SCALINGS: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "default": ((), _default),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _llama3),
}
"""The scalings of the frequencies by their names in Hugging Face's configurations: their numbers and their function."""


class Rotary:
    """The frequencies ``theta^(-2i/d)`` with which the pairs (i, i + d/2) of a head of width d turn with the position.

    Parameters
    ----------
    theta : float, optional
        The base; by default ``rope_theta`` of the scaling, or 10000.
    scaling : mapping, optional
        The mapping ``rope_scaling`` or ``rope_parameters`` of a Hugging Face configuration: ``rope_type``
        (``"default"``, ``"linear"`` or ``"llama3"``; older files say ``type``) and the numbers that the type needs.
        Other keys are ignored.

    Raises
    ------
    OptionError
        If the scaling has another type, lacks a number, or turns only a part of each head.

    References
    ----------
    Su et al.: RoFormer, 2021. Chen et al.: Extending context window via positional interpolation, 2023 (linear).
    Llama team: The Llama 3 herd of models, 2024.

    Examples
    --------
    >>> Rotary(10000.0).frequencies(4)
    array([1.  , 0.01])
    """

    def __init__(self, theta: float | None = None, scaling: Mapping[str, Any] | None = None) -> None:
        given = dict(scaling or {})
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in SCALINGS:
            raise OptionError(f"rotary scaling {kind!r}: use one of {', '.join(map(repr, SCALINGS))}")
        keys, self._scale = SCALINGS[kind]
        missing = [key for key in keys if given.get(key) is None]
        if missing:
            raise OptionError(f"rotary scaling {kind!r} needs {', '.join(keys)}; it lacks {', '.join(missing)}")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise OptionError(
                f"partial_rotary_factor={given['partial_rotary_factor']}: heads are turned whole; only 1.0 is known"
            )
        self.theta = float(given.get("rope_theta") or 10000.0 if theta is None else theta)
        self._numbers = tuple(float(given[key]) for key in keys)

    def frequencies(self, width: int) -> np.ndarray:
        """Return the angles by which one position turns the pairs of a head.

        Parameters
        ----------
        width : int
            Width d of a head.

        Returns
        -------
        array of float64, ``[d/2]``
            Angles in radians per position.

        Raises
        ------
        ShapeError
            If the width is odd.
        """
        if width % 2:
            raise ShapeError(f"rotary positions turn pairs: the width of a head must be even; it is {width}")
        plain = self.theta ** (-np.arange(0, width, 2) / width)
        scaled: np.ndarray = self._scale(plain, *self._numbers)
        return scaled

    def angles(self, x: DistArray, positions: Block | None) -> tuple[Block, Block]:
        """Return cosine and sine of the angles of this rank's tokens.

        Parameters
        ----------
        x : DistArray, ``[b, s, ..., d]``
            Queries or keys.
        positions : Block, ``[s]`` or ``[b, s]``, optional
            Positions of this rank's tokens; None: their indices in s.

        Returns
        -------
        cos : Block, ``[s, d/2]`` or ``[b, s, d/2]``
            In the dtype of x, for 16-bit floats in float32.
        sin : Block, ``[s, d/2]`` or ``[b, s, d/2]``
            In the same dtype.
        """
        frequencies, dtype = self.frequencies(x.shape[-1]), x.local.dtype
        dtype = backend.wide_dtype(x.local) if backend.is_half(dtype) else dtype
        if positions is None:
            table = _table(frequencies.tobytes(), x.box[1], backend.numpy_dtype(dtype))
            cos, sin = (backend.to_block(part, x.local) for part in table)
            return cos, sin
        xp = backend.namespace(positions)
        angle = xp.astype(positions, xp.float64)[..., None] * backend.to_block(frequencies, positions)
        return xp.astype(xp.cos(angle), dtype), xp.astype(xp.sin(angle), dtype)


@lru_cache(maxsize=8)
def _table(frequencies: bytes, indices: tuple[int, int], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine ``[s, d/2]`` for a range of positions; a cache keeps them for the other layers."""
    angle = np.arange(*indices)[:, None] * np.frombuffer(frequencies)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


class Rotation(Layer):
    """The rotation of heads ``[b, s, n, ..., d]`` by the angles of their positions.

    Parameters
    ----------
    rotary : Rotary
        The frequencies.
    turned : int, optional
        Number of leading entries of dim n to rotate: 2 for packed queries, keys and values; by default all.

    Raises
    ------
    ShapeError
        From `forward`, if the positions of the context are neither ``[s]`` nor ``[b, s]``.
    DTypeError
        From `forward`, if they are not integers.

    Notes
    -----
    The positions are `Context.positions`, or the indices in the sequence where there are none.

    **Communication:** none, except for positions that are a DistArray in another layout. Partial sums stay partial.

    **Adjoint:** the rotation by the negative angles.
    """

    def __init__(self, rotary: Rotary, turned: int | None = None) -> None:
        self.rotary, self.turned = rotary, turned

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        cos, sin = self.rotary.angles(x, ctx.positions_of(x))
        return self._turn(x, cos, sin), (x.layout, cos, sin)

    def _turn(self, x: DistArray, cos: Block, sin: Block) -> DistArray:
        rotate = kernels.of(x.grid).rotate
        if self.turned is None:
            return x.like(rotate(x.local, cos, sin))
        block = backend.empty_like(x.local, x.local.shape)
        block[:, :, : self.turned, ...] = rotate(x.local[:, :, : self.turned, ...], cos, sin)
        block[:, :, self.turned :, ...] = x.local[:, :, self.turned :, ...]
        return x.like(block)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        layout, cos, sin = cache
        partial = [axis for axis in dy.layout.partial if axis not in layout.cut]
        # dY -> dY in the layout of X, where partial sums may stay
        return self._turn(dy.redistribute(layout.with_partial(*partial)), cos, -sin)
