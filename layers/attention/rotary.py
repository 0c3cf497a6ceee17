"""Rotary position embeddings: they rotate queries and keys by their positions, so that scores depend on distances.

The Llama models make a `Rotary`; `SelfAttention` puts a `Rotation` between its products and attention, which calls the
kernel ``rotate`` of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

ORIGINAL = "original_max_position_embeddings"


def _default(frequencies: np.ndarray, theta: float, given: Mapping[str, Any]) -> np.ndarray:
    return frequencies


def _linear(frequencies: np.ndarray, theta: float, given: Mapping[str, Any]) -> np.ndarray:
    scaled: np.ndarray = frequencies / given["factor"]
    return scaled


def _llama3(frequencies: np.ndarray, theta: float, given: Mapping[str, Any]) -> np.ndarray:
    """Divide the frequencies that turn less than `low` times in the first positions by the factor.

    Frequencies that turn more than `high` times stay as they are, and the ones between are blended.
    """
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = given[ORIGINAL] * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else np.where(turns > high, 1.0, 0.0)
    blended: np.ndarray = share * frequencies + (1.0 - share) * frequencies / given["factor"]
    return blended


def _yarn(frequencies: np.ndarray, theta: float, given: Mapping[str, Any]) -> np.ndarray:
    """Divide the frequencies of the last pairs by the factor, keep those of the first, and blend linearly between them.

    The blend begins at the pair that turns ``beta_fast`` times in the first positions, and ends at the one that turns
    ``beta_slow`` times; with ``truncate`` the numbers of the two pairs are rounded away from each other.
    """
    width, limits = 2 * len(frequencies), (given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0)
    # positions theta^(-2i/d) = 2 pi turns  ->  i
    first, last = (width * math.log(given[ORIGINAL] / (2 * math.pi * x)) / (2 * math.log(theta)) for x in limits)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # as in transformers: a step in place of a slope
    share = np.clip((np.arange(len(frequencies)) - first) / (last - first), 0.0, 1.0)
    blended: np.ndarray = share * frequencies / given["factor"] + (1.0 - share) * frequencies
    return blended


def _one(given: Mapping[str, Any]) -> float:
    return 1.0


def _yarn_magnitude(given: Mapping[str, Any]) -> float:
    """Return ``attention_factor``, or ``0.1 ln(factor) + 1``, which keeps the entropy of attention to more keys."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    above, below, logarithm = given.get("mscale"), given.get("mscale_all_dim"), math.log(max(1.0, given["factor"]))
    if above and below:
        return float((0.1 * above * logarithm + 1.0) / (0.1 * below * logarithm + 1.0))
    return 0.1 * logarithm + 1.0


@dataclass(frozen=True)
class Scaling:
    """A scaling of rotary frequencies.

    Parameters
    ----------
    scale : callable
        A function of the frequencies, theta and the mapping of the configuration that returns the scaled frequencies.
    needed : tuple of str
        The keys that the mapping must have.
    optional : tuple of str
        The keys of numbers that it may have.
    magnitude : callable
        A function of the mapping that returns the factor of the rotated queries and keys.
    """

    scale: Callable[[np.ndarray, float, Mapping[str, Any]], np.ndarray]
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    magnitude: Callable[[Mapping[str, Any]], float] = _one


_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
SCALINGS: dict[str, Scaling] = {
    "default": Scaling(_default),
    "linear": Scaling(_linear, ("factor",)),
    "llama3": Scaling(_llama3, ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    "yarn": Scaling(_yarn, ("factor", ORIGINAL), _YARN, _yarn_magnitude),
}
"""The scalings of the frequencies by their names in Hugging Face's configurations."""


class Rotary:
    """The frequencies ``theta^(-2i/d)`` with which the pairs (i, i + d/2) of a head of width d turn with the position.

    Parameters
    ----------
    theta : float, optional
        The base; by default ``rope_theta`` of the scaling, or 10000.
    scaling : mapping, optional
        The mapping ``rope_scaling`` or ``rope_parameters`` of a Hugging Face configuration: ``rope_type``
        (``"default"``, ``"linear"``, ``"llama3"`` or ``"yarn"``; older files say ``type``) and the numbers that the
        type needs. Other keys are ignored.

    Raises
    ------
    OptionError
        If the scaling has another type, lacks a number, has one that cannot be, or turns only a part of each head.

    References
    ----------
    Su et al.: RoFormer, 2021. Chen et al.: Extending context window via positional interpolation, 2023 (linear).
    Llama team: The Llama 3 herd of models, 2024. Peng et al.: YaRN: efficient context window extension of large
    language models, 2023.

    Examples
    --------
    >>> Rotary(10000.0).frequencies(4)
    array([1.  , 0.01])
    """

    def __init__(self, theta: float | None = None, scaling: Mapping[str, Any] | None = None) -> None:
        self._given = given = dict(scaling or {})
        kind = given.get("rope_type", given.get("type", "default"))
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise OptionError(f"rotary scaling {kind!r}: use one of {', '.join(map(repr, SCALINGS))}")
        self._scaling = known = SCALINGS[kind]
        missing = [key for key in known.needed if given.get(key) is None]
        if missing:
            raise OptionError(f"rotary scaling {kind!r} needs {', '.join(known.needed)}; it lacks {', '.join(missing)}")
        for key in (*known.needed, *known.optional):
            _require_number(f"rotary scaling {kind!r}: {key}", given.get(key), key in ("factor", ORIGINAL))
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise OptionError(
                f"partial_rotary_factor={given['partial_rotary_factor']}: heads are turned whole; only 1.0 is known"
            )
        base = given.get("rope_theta") or 10000.0 if theta is None else theta
        _require_number("rope_theta", base, True)
        self.theta, self._magnitude = float(base), known.magnitude(given)
        if kind == "yarn" and self.theta <= 1.0:
            raise OptionError(f"rotary scaling 'yarn' needs rope_theta above 1; it is {self.theta}")

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
        scaled: np.ndarray = self._scaling.scale(plain, self.theta, self._given)
        return scaled

    def angles(self, x: DistArray, positions: Block | None) -> tuple[Block, Block]:
        """Return cosine and sine of the angles of this rank's tokens, times the factor that the scaling has for them.

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
            table = _table(frequencies.tobytes(), x.box[1], backend.numpy_dtype(dtype), self._magnitude)
            cos, sin = (backend.to_block(part, x.local) for part in table)
            return cos, sin
        xp = backend.namespace(positions)
        angle = xp.astype(positions, xp.float64)[..., None] * backend.to_block(frequencies, positions)
        cos, sin = self._magnitude * xp.cos(angle), self._magnitude * xp.sin(angle)
        return xp.astype(cos, dtype), xp.astype(sin, dtype)


def _require_number(name: str, value: object, above: bool) -> None:
    """Raise OptionError unless a value is None or a finite number of 0 or more, or above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if value is not None and (not number or (above and value == 0)):
        raise OptionError(f"{name}={value!r}: it must be a number {'above 0' if above else 'of 0 or more'}")


@lru_cache(maxsize=8)
def _table(
    frequencies: bytes, indices: tuple[int, int], dtype: np.dtype, magnitude: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine ``[s, d/2]`` for a range of positions; a cache keeps them for the other layers."""
    angle = np.arange(*indices)[:, None] * np.frombuffer(frequencies)
    return (magnitude * np.cos(angle)).astype(dtype), (magnitude * np.sin(angle)).astype(dtype)


class Rotation(Layer):
    """The rotation of heads ``[b, s, n, ..., d]`` by the angles of their positions, and their scaling for YaRN.

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

    **Adjoint:** the rotation by the negative angles, with the same scaling.
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
