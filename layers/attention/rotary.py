"""Rotary positions: queries and keys turned by angles of their positions, so that scores see distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError, ShapeError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.positions import given_positions
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


def _default(frequencies: np.ndarray) -> np.ndarray:
    return frequencies


def _linear(frequencies: np.ndarray, factor: float) -> np.ndarray:
    return frequencies / factor


def _llama3(frequencies: np.ndarray, factor: float, low: float, high: float, positions: float) -> np.ndarray:
    """Return the frequencies, those that turn less than `low` times in the first `positions` divided by `factor`.

    Those that turn more than `high` times stay; in between the two are blended.
    """
    turns = positions * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else np.where(turns > high, 1.0, 0.0)
    return kept * frequencies + (1.0 - kept) * frequencies / factor


SCALINGS: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "default": ((), _default),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _llama3),
}
"""Scalings of the frequencies by their names in Hugging Face's configurations, and the numbers that they need."""


class Rotary:
    """The frequencies ``theta^(-2i/d)`` at which the pairs (i, i + d/2) of a head of width d turn with the position.

    Parameters
    ----------
    theta : float, optional
        The base; the scaling's ``rope_theta`` by default, or 10000.
    scaling : mapping, optional
        As Hugging Face has it in ``rope_scaling`` or ``rope_parameters``: ``rope_type`` (``"default"``, ``"linear"`` or
        ``"llama3"``; older files say ``type``) and the numbers that the type needs; other keys are left alone.

    Raises
    ------
    OptionError
        If the scaling is of another type, lacks a number, or is to turn a part of each head.

    References
    ----------
    Su et al.: RoFormer, 2021. Chen et al.: Extending context window via positional interpolation, 2023 (linear).
    Llama team: The Llama 3 herd of models, 2024.
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
        """Return the angles per position ``[d/2]`` in float64 for heads of width d.

        Raises
        ------
        ShapeError
            If the width is odd.
        """
        if width % 2:
            raise ShapeError(f"rotary positions turn pairs: the width of a head must be even; it is {width}")
        plain = self.theta ** (-np.arange(0, width, 2) / width)
        return self._scale(plain, *self._numbers)

    def angles(self, x: DistArray, positions: Block | None) -> tuple[Block, Block]:
        """Return cosine and sine of the angles of this rank's part of ``x [b, s, ..., d]``, in its dtype.

        Computed in float64; in float32 for 16-bit floats.
        Those of given positions ``[s]`` or ``[b, s]`` are ``[s, d/2]`` or ``[b, s, d/2]``.
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
def _table(frequencies: bytes, span: tuple[int, int], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine ``[s, d/2]`` of the angles of a range of positions; every layer asks for the same."""
    angle = np.arange(*span)[:, None] * np.frombuffer(frequencies)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


class Rotation(Layer):
    """Turn heads ``[b, s, n, ..., d]`` by the angles of their positions, the context's or their indices.

    **Communication:** none. **Adjoint:** the rotation by the angles' negatives; partial sums stay partial.

    Parameters
    ----------
    rotary : Rotary
    turned : int, optional
        Turn the first of dim n only (the queries and keys of three, say); all of it by default.
    """

    def __init__(self, rotary: Rotary, turned: int | None = None) -> None:
        self.rotary, self.turned = rotary, turned

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the turned heads in the layout of x."""
        cos, sin = self.rotary.angles(x, given_positions(ctx, x))
        return self._turn(x, cos, sin), (x.layout, cos, sin)

    def _turn(self, x: DistArray, cos: Block, sin: Block) -> DistArray:
        if self.turned is None:
            return x.like(kernels.of(x.grid).rotate(x.local, cos, sin))
        block = backend.empty_like(x.local, x.local.shape)
        block[:, :, : self.turned, ...] = kernels.of(x.grid).rotate(x.local[:, :, : self.turned, ...], cos, sin)
        block[:, :, self.turned :, ...] = x.local[:, :, self.turned :, ...]
        return x.like(block)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return `dy` turned back."""
        layout, cos, sin = cache
        partial = [axis for axis in dy.layout.partial if axis not in layout.cut]
        return self._turn(dy.redistribute(layout.with_partial(*partial)), cos, -sin)
