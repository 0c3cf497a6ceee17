"""Sampling: tokens are drawn from logits whose vocabulary is cut, so that no rank ever holds all logits.

`generate` calls `draw` once for each new token. The ranks that cut the vocabulary offer one another their greatest
logits, and every rank draws from the same candidates.
"""

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

CANDIDATES = 64
"""Candidates that each rank offers in the first round, where their number is not known beforehand."""
GROWTH = 8
"""Factor by which the number of candidates grows from round to round."""
NO_TOKEN = -1
"""Returned in place of a token where the logits are not numbers."""


@dataclass(frozen=True)
class Sampling:
    """The options with which tokens are drawn.

    Parameters
    ----------
    temperature : float
        Divisor of the logits. 0 takes the greatest logit, the first one of equal ones.
    top_k : int, optional
        Draw from the k greatest logits alone; of equal logits the first ones count.
    top_p : float
        Draw from the fewest tokens whose probabilities add up to it. With `top_k` the probabilities of the k tokens are
        first scaled to add up to 1.
    seed : int
        Seed of the random numbers.
    vocabulary : int, optional
        Tokens from this number on are never drawn.

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
    def candidates(self) -> int | None:
        """The number of candidates, None if it depends on the logits."""
        return 1 if self.temperature == 0 else self.top_k


def draw(logits: DistArray, positions: np.ndarray, sampling: Sampling) -> DistArray:
    """Return a token for each row of logits, -1 where they are not numbers.

    Parameters
    ----------
    logits : DistArray
        Logits ``[b, s, v]`` in any layout. The layout of a head's result costs no redistribution.
    positions : array of int
        Positions ``[b, s]`` of the tokens that are drawn, in NumPy, the same on all ranks. The random number of sample
        i at position p is a function of (seed, i, p).
    sampling : Sampling
        Options of the draw.

    Returns
    -------
    DistArray
        Tokens ``[b, s]`` in int64, cut over b and s as the logits are.

    Notes
    -----
    Tokens are taken in descending order of their probabilities, equal ones in ascending order. The token drawn is the
    first one at which the sum of the probabilities passes the random number. The sums are in float64; where a random
    number falls within rounding of a border, another grid may draw the neighbour.

    **Communication:** over the p ranks that cut v, an allgather of the candidates of all ranks: ``2 m (p - 1)`` words
    received by each rank for each row and m candidates of each rank. m is `top_k`, or 1 at temperature 0. Without
    `top_k` m starts at 64 and is multiplied by 8 from round to round, until the probabilities of the tokens that are
    known to be the greatest suffice; an allreduce of one word for each row gives the divisor of the softmax.
    """
    logits = logits.reduced()
    dims, at = logits.layout.dims, tuple(slice(*extent) for extent in logits.box[:2])
    xp, block = backend.namespace(logits.local), logits.local
    rows = _Rows(xp.astype(xp.reshape(block, (block.shape[0] * block.shape[1], block.shape[2])), xp.float64), logits)
    samples = np.broadcast_to(np.arange(logits.shape[0])[:, None], logits.shape[:2])[at].reshape(-1)
    unit = random.uniform_at(samples, positions[at].reshape(-1), sampling.seed, "generate")
    tokens = _draw(rows, unit, sampling).reshape(block.shape[:2])
    return DistArray(backend.to_block(tokens, block), logits.shape[:2], Layout(*dims[:2]), logits.grid)


class _Rows:
    """The block of this rank of the logits ``[n, v]`` of n rows, cut over v."""

    def __init__(self, block: Block, logits: DistArray) -> None:
        self.block, self.grid, self.axes, self.start = block, logits.grid, logits.layout.dims[2], logits.box[2][0]
        self.size = logits.shape[2]
        self._order: Block | None = None

    def hide(self, vocabulary: int) -> None:
        """Set the logits of tokens from `vocabulary` on to minus infinity."""
        self.block[:, max(0, vocabulary - self.start) :] = -math.inf

    def _greatest_here(self, count: int) -> Block:
        """Return the indices ``[n, count]`` of the greatest logits of this rank."""
        xp = backend.namespace(self.block)
        if count == 1:
            return xp.argmax(self.block, axis=1, keepdims=True)
        if self._order is None:
            self._order = xp.argsort(-self.block, axis=1, stable=True)
        return self._order[:, :count]

    def greatest(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the candidates of all ranks: their logits and tokens ``[n, m]`` in order, and a bound ``[n, 1]``.

        Each rank offers its `count` greatest logits. No logit that is not offered exceeds the bound, which is the
        greatest of the last logits that the ranks offered; it is minus infinity where the ranks offered all.
        """
        xp, (n, own) = backend.namespace(self.block), self.block.shape
        offered = xp.zeros((2, n, count), dtype=xp.float64)
        offered[0, ...] = -math.inf
        if own:
            first = self._greatest_here(min(count, own))
            offered[0, :, : first.shape[1]] = xp.take_along_axis(self.block, first, axis=1)
            offered[1, :, : first.shape[1]] = xp.astype(first + self.start, xp.float64)
        p = self.grid.extent(self.axes)
        if p > 1:
            # offered[2, N, M] of each rank -> all[P, 2, N, M]: allgather over the axes that cut v
            offered = comm.allgather(xp.reshape(offered, (-1,)), self.grid, self.axes, [offered.size] * p)
        each = backend.to_host(offered).reshape(p, 2, n, count)
        values, tokens = (each[:, i].swapaxes(0, 1).reshape(n, p * count) for i in (0, 1))
        order = np.argsort(-values, axis=1, kind="stable")
        bound = each[:, 0, :, -1].max(axis=0, initial=-math.inf)[:, None]
        return np.take_along_axis(values, order, 1), np.take_along_axis(tokens, order, 1).astype(np.int64), bound

    def total(self, top: np.ndarray, temperature: float) -> np.ndarray:
        """Return the sums ``[n, 1]`` of ``exp((logits - top) / temperature)`` over the whole vocabulary."""
        xp = backend.namespace(self.block)
        # sums[N] {U_v} -> sums[N]: allreduce over the axes that cut v
        sums = xp.sum(xp.exp((self.block - backend.to_block(top, self.block)) / temperature), axis=1)
        return backend.to_host(comm.allreduce(sums, self.grid, self.axes))[:, None]


def _draw(rows: _Rows, unit: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return a token for each row ``[n]``, drawn by random numbers ``[n]`` from 0 to 1."""
    if sampling.vocabulary is not None:
        rows.hide(sampling.vocabulary)
    count = CANDIDATES if sampling.candidates is None else min(sampling.candidates, rows.size)
    values, tokens, bound = rows.greatest(count)
    if sampling.temperature == 0:
        return _checked(tokens[:, 0], values[:, 0])
    total = None if sampling.candidates is not None else rows.total(values[:, :1], sampling.temperature)
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
    """Return which candidates ``[n, 1]`` are drawn, and whether the candidates sufficed to tell for all rows."""
    certain = np.sum(values > bound, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # from logits that are not numbers
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
    """Return the tokens, `NO_TOKEN` where a figure of the row is not finite."""
    return np.where(np.isfinite(figures), tokens, NO_TOKEN)
