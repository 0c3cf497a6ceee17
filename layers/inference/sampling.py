"""Draw tokens by their logits, of which each rank has those of some tokens: no rank ever holds all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from colossal_mpi import comm, random
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

FIRST = 64
"""Candidates that each rank offers where their number is not known before, and by how much it grows."""
GROWTH = 8
NONE = -1
"""Stands for the token where the logits are no numbers."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Parameters
    ----------
    temperature : float
        Logits are divided by it; 0 takes the greatest, the first of equal ones.
    top_k : int, optional
        Only the k greatest are drawn, of equal ones the first.
    top_p : float
        Only the greatest are drawn, as many as it takes for their probabilities to add up to it (of those of `top_k`,
        which are made to add up to 1 before).
    seed : int
    vocabulary : int, optional
        Tokens from this one on are never drawn.

    Raises
    ------
    OptionError
        If a number is out of its range.

    References
    ----------
    Fan, Lewis, Dauphin: Hierarchical neural story generation, 2018 (top-k). Holtzman et al.: The curious case of neural
    text degeneration, 2020 (top-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        counts = [n for n in (self.top_k, self.vocabulary) if n is not None]
        if not (0 <= self.temperature < math.inf and 0 < self.top_p <= 1 and all(n >= 1 for n in counts)):
            raise OptionError(
                f"sampling with temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, vocabulary="
                f"{self.vocabulary}: temperature must be 0 or more, top_p above 0 and at most 1, the others 1 or more"
            )

    @property
    def most(self) -> int | None:
        """The number of candidates, where it is known before."""
        return 1 if self.temperature == 0 else self.top_k


def draw(logits: DistArray, positions: np.ndarray, sampling: Sampling) -> DistArray:
    """Return a token for each row of logits ``[b, s, v]``, -1 where they are no numbers.

    Parameters
    ----------
    logits : DistArray
        In any layout; free in that of a head's result.
    positions : array of int, ``[b, s]``
        Of the tokens that are drawn. The random number of sample i at position p is a function of (seed, i, p).
    sampling : Sampling

    Returns
    -------
    DistArray of int64, ``[b, s]``
        Cut as the logits are.

    Notes
    -----
    Tokens are taken in descending order of their probabilities, equal ones in ascending order: the token is the first
    at which their sum passes the random number. Each rank offers the greatest of its own and all merge what they are
    offered. The sums are in float64; where a random number falls within rounding of a border another grid may take the
    neighbour.

    **Communication:** over the p ranks that cut v, for each row: ``2 m (p - 1)`` words received by each rank for m
    candidates of each, which are `top_k`, or 1 at temperature 0. Without `top_k` m is 64, or, in rounds, 8 times more
    each time while the sum of those that are known to be the greatest falls short, and the softmax's divisor is summed:
    a word each.
    """
    logits = logits.reduced()
    dims, at = logits.layout.dims, tuple(slice(*span) for span in logits.box[:2])
    xp, block = backend.namespace(logits.local), logits.local
    rows = _Rows(xp.astype(xp.reshape(block, (block.shape[0] * block.shape[1], block.shape[2])), xp.float64), logits)
    samples = np.broadcast_to(np.arange(logits.shape[0])[:, None], logits.shape[:2])[at].reshape(-1)
    unit = random.uniform_at(samples, positions[at].reshape(-1), sampling.seed, "generate")
    tokens = _draw(rows, unit, sampling).reshape(block.shape[:2])
    return DistArray(backend.to_block(tokens, block), logits.shape[:2], Layout(*dims[:2]), logits.grid)


class _Rows:
    """The part of rows of logits ``[n, v]`` that this rank has."""

    def __init__(self, block: Block, logits: DistArray) -> None:
        self.block, self.grid, self.axes, self.start = block, logits.grid, logits.layout.dims[2], logits.box[2][0]
        self.size = logits.shape[2]
        self._order: Block | None = None

    def hide(self, vocabulary: int) -> None:
        """Make the logits of tokens from `vocabulary` on minus infinity."""
        self.block[:, max(0, vocabulary - self.start) :] = -math.inf

    def _first(self, count: int) -> Block:
        xp = backend.namespace(self.block)
        if count == 1:
            return xp.argmax(self.block, axis=1, keepdims=True)
        if self._order is None:
            self._order = xp.argsort(-self.block, axis=1, stable=True)
        return self._order[:, :count]

    def greatest(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return logits and tokens that all ranks offer, ``[n, m]`` in order, and what all that are not offered reach.

        The last ``[n, 1]`` is the greatest of what the ranks offered last; minus infinity where they offered all.
        """
        xp, (n, own) = backend.namespace(self.block), self.block.shape
        offered = xp.zeros((2, n, count), dtype=xp.float64)
        offered[0, ...] = -math.inf
        if own:
            first = self._first(min(count, own))
            offered[0, :, : first.shape[1]] = xp.take_along_axis(self.block, first, axis=1)
            offered[1, :, : first.shape[1]] = xp.astype(first + self.start, xp.float64)
        p = self.grid.extent(self.axes)
        if p > 1:
            offered = comm.allgather(xp.reshape(offered, (-1,)), self.grid, self.axes, [offered.size] * p)
        each = backend.to_host(offered).reshape(p, 2, n, count)
        values, tokens = (each[:, i].swapaxes(0, 1).reshape(n, p * count) for i in (0, 1))
        order = np.argsort(-values, axis=1, kind="stable")
        bound = each[:, 0, :, -1].max(axis=0, initial=-math.inf)[:, None]
        return np.take_along_axis(values, order, 1), np.take_along_axis(tokens, order, 1).astype(np.int64), bound

    def total(self, top: np.ndarray, temperature: float) -> np.ndarray:
        """Return the sums ``[n, 1]`` of ``exp((logits - top) / temperature)`` over all ranks."""
        xp = backend.namespace(self.block)
        sums = xp.sum(xp.exp((self.block - backend.to_block(top, self.block)) / temperature), axis=1)
        return backend.to_host(comm.allreduce(sums, self.grid, self.axes))[:, None]


def _draw(rows: _Rows, unit: np.ndarray, sampling: Sampling) -> np.ndarray:
    if sampling.vocabulary is not None:
        rows.hide(sampling.vocabulary)
    count = FIRST if sampling.most is None else min(sampling.most, rows.size)
    values, tokens, bound = rows.greatest(count)
    if sampling.temperature == 0:
        return _checked(tokens[:, 0], values[:, 0])
    total = None if sampling.most is not None else rows.total(values[:, :1], sampling.temperature)
    while True:
        if total is None:
            values, bound = values[:, :count], np.full_like(bound, -math.inf)
        which, known = _which(values, bound, total, unit[:, None], sampling)
        if known:
            return _checked(np.take_along_axis(tokens, which, 1)[:, 0], values[:, 0] if total is None else total[:, 0])
        count *= GROWTH
        values, tokens, bound = rows.greatest(count)


def _which(
    values: np.ndarray, bound: np.ndarray, total: np.ndarray | None, unit: np.ndarray, sampling: Sampling
) -> tuple[np.ndarray, bool]:
    """Return which candidates ``[n, 1]`` are drawn, and whether all that counted for it is among the candidates."""
    certain = np.sum(values > bound, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # of logits that are no numbers
        sums = np.cumsum(np.exp((values - values[:, :1]) / sampling.temperature), axis=1)
    last = np.maximum(certain - 1, 0)
    whole = sums[:, -1:] if total is None else total
    needed = np.zeros_like(last)
    if sampling.top_p < 1:
        needed = np.sum(sums < sampling.top_p * whole, axis=1, keepdims=True)
        whole = np.take_along_axis(sums, np.minimum(needed, last), 1)
    which = np.sum(sums <= unit * whole, axis=1, keepdims=True)
    complete = (np.maximum(needed, which) < certain) | (bound == -math.inf)
    return np.minimum(which, last), bool(np.all(complete))


def _checked(tokens: np.ndarray, figures: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(figures), tokens, NONE)
