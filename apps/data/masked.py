"""Sequences for a masked language model: text with marks, in pairs, and with some bytes hidden.

The task ``masked`` calls `MaskedFormat`, which draws everything from ``colossal_mpi.random`` by the seed and the number
of the sample, so that a sample is the same on every grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colossal_mpi import random
from colossal_mpi.apps.data.corpus import Tokens

BYTE_VALUES, CLS, SEP, MASK = 256, 256, 257, 258
"""The number of bytes, and the tokens that follow the bytes: CLS begins a sequence, SEP ends each part, and MASK stands
in the place of a hidden byte."""

_MASKED, _RANDOM = 0.8, 0.1
"""Shares of the hidden tokens that become MASK and that become a random byte; the others stay as they are."""


@dataclass(frozen=True)
class MaskedRows:
    """Some sequences, one in a row.

    Parameters
    ----------
    inputs : array of int64
        Tokens ``[n, length]``, some of them hidden.
    labels : array of int64
        The tokens that are hidden, ``[n, length]``; -1 where nothing is hidden.
    segments : array of int64
        The part of the sequence that each token is in, ``[n, length]``: 0 or 1.
    unrelated : array of int64
        For each row ``[n]``, 1 if its second part comes from elsewhere in the text, else 0.
    """

    inputs: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    unrelated: np.ndarray


@dataclass(frozen=True)
class MaskedFormat:
    """The form of a sequence: ``CLS text SEP``, or with pairs ``CLS first SEP second SEP``.

    Every sequence has the same number of hidden tokens, at least one, so that the number of labels is known beforehand.

    Parameters
    ----------
    length : int
        Tokens of a sequence, marks included.
    pairs : bool
        Whether a sequence has two parts; half of the second parts come from elsewhere in the text.
    share : float
        Share of the bytes that are hidden.

    References
    ----------
    Devlin et al.: BERT, 2019. Liu et al.: RoBERTa, 2019 (without pairs; other tokens hidden in each epoch).
    """

    length: int
    pairs: bool
    share: float

    @property
    def bytes(self) -> int:
        """Number of bytes of text in a sequence."""
        return self.length - (3 if self.pairs else 2)

    @property
    def hidden(self) -> int:
        """Number of hidden tokens in a sequence."""
        return max(1, round(self.share * self.bytes))

    def make(self, text: Tokens, starts: np.ndarray, first: int, seed: int, stream: str) -> MaskedRows:
        """Return the sequences that begin at some places of a text.

        Parameters
        ----------
        text : array of uint8
            The corpus.
        starts : array of int64
            Where each sequence begins.
        first : int
            Number of the first sequence; the others follow it.
        seed : int
            Seed of the run.
        stream : str
            Name of the stream of random numbers: training and validation have different ones.

        Returns
        -------
        MaskedRows
            A row for each start.
        """
        rows, half = (first, first + len(starts)), (self.bytes + 1) // 2
        content = text[starts[:, None] + np.arange(self.bytes)].astype(np.int64)
        unrelated = np.zeros(len(starts), np.int64)
        if self.pairs:
            coin, place = _uniform(rows, 2, seed, f"{stream}/pair").T
            unrelated = (coin < 0.5).astype(np.int64)
            elsewhere = (place * (len(text) - self.bytes)).astype(np.int64)
            second = np.where(unrelated == 1, elsewhere, starts + half)
            content[:, half:] = text[second[:, None] + np.arange(self.bytes - half)]
        plain, segments = self._marked(content, half)
        inputs, labels = self._hide(plain, rows, seed, stream)
        return MaskedRows(inputs, labels, segments, unrelated)

    def _marked(self, content: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows between their marks, and the segment of each token."""
        parts = [content[:, :half], content[:, half:]] if self.pairs else [content]
        ends = [np.full((len(content), 1), mark) for mark in (CLS, SEP)]
        pieces = [ends[0], *(piece for part in parts for piece in (part, ends[1]))]
        segments = np.zeros((len(content), self.length), np.int64)
        if self.pairs:
            segments[:, half + 2 :] = 1
        return np.concatenate(pieces, axis=1), segments

    def _hide(self, plain: np.ndarray, rows: tuple[int, int], seed: int, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows with some tokens hidden, and the labels."""
        draws = (_uniform(rows, self.length, seed, f"{stream}/{name}") for name in ("hidden", "as", "byte"))
        order, way, byte = draws
        order = np.where(plain < BYTE_VALUES, order, 2.0)  # marks come last
        hidden = np.argsort(np.argsort(order, axis=1, kind="stable"), axis=1) < self.hidden
        shown = np.where(way < _MASKED + _RANDOM, (byte * BYTE_VALUES).astype(np.int64), plain)
        shown = np.where(way < _MASKED, MASK, shown)
        return np.where(hidden, shown, plain), np.where(hidden, plain, -1)


def _uniform(rows: tuple[int, int], columns: int, seed: int, stream: str) -> np.ndarray:
    """Return uniform numbers ``[rows, columns]``; each row is a function of its number and the seed."""
    return random.uniform_block((rows, (0, columns)), (rows[1], columns), seed, stream)
