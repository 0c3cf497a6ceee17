"""Text as a masked language model takes it: marked, paired and partly hidden, by seed and sample number alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from colossal_mpi import random

BYTES, CLS, SEP, MASK = 256, 256, 257, 258
"""The number of bytes, and the tokens after them: first in a sequence, after each part, and in a hidden one's place."""

_MASKED, _RANDOM = 0.8, 0.1
"""Of the hidden tokens, so many become MASK and so many any byte; the others stay as they are."""


@dataclass(frozen=True)
class Sequences:
    """Rows of tokens; labels are -1 where nothing is hidden."""

    inputs: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    other: np.ndarray
    """Of each row, 1 if its second part is from elsewhere, else 0."""


@dataclass(frozen=True)
class Form:
    """``CLS text SEP``, or with pairs ``CLS first SEP second SEP``, of `length` tokens.

    The same share of every sequence is hidden, at least one token, so that all numbers of labels are known beforehand.

    References
    ----------
    Devlin et al.: BERT, 2019. Liu et al.: RoBERTa, 2019 (without pairs; hidden anew in each epoch).
    """

    length: int
    pairs: bool
    share: float

    @property
    def bytes(self) -> int:
        """The bytes of text in a sequence."""
        return self.length - (3 if self.pairs else 2)

    @property
    def hidden(self) -> int:
        """The tokens of a sequence that are hidden."""
        return max(1, round(self.share * self.bytes))

    def make(self, text: np.ndarray, starts: np.ndarray, first: int, seed: int, stream: str) -> Sequences:
        """Return the sequences number `first` and on, which begin at `starts` in the text."""
        rows, half = (first, first + len(starts)), (self.bytes + 1) // 2
        content = text[starts[:, None] + np.arange(self.bytes)].astype(np.int64)
        other = np.zeros(len(starts), np.int64)
        if self.pairs:
            coin, place = _uniform(rows, 2, seed, f"{stream}/pair").T
            other = (coin < 0.5).astype(np.int64)
            elsewhere = (place * (len(text) - self.bytes)).astype(np.int64)
            second = np.where(other == 1, elsewhere, starts + half)
            content[:, half:] = text[second[:, None] + np.arange(self.bytes - half)]
        plain, segments = self._marked(content, half)
        inputs, labels = self._hide(plain, rows, seed, stream)
        return Sequences(inputs, labels, segments, other)

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
        """Return the rows with some tokens hidden, and those as labels."""
        draws = (_uniform(rows, self.length, seed, f"{stream}/{name}") for name in ("hidden", "as", "byte"))
        order, way, byte = draws
        order = np.where(plain < BYTES, order, 2.0)  # marks come last
        hidden = np.argsort(np.argsort(order, axis=1, kind="stable"), axis=1) < self.hidden
        shown = np.where(way < _MASKED + _RANDOM, (byte * BYTES).astype(np.int64), plain)
        shown = np.where(way < _MASKED, MASK, shown)
        return np.where(hidden, shown, plain), np.where(hidden, plain, -1)


def _uniform(rows: tuple[int, int], columns: int, seed: int, stream: str) -> np.ndarray:
    """Return uniform numbers ``[rows, columns]``, those of a row a function of its number."""
    return random.uniform_block((rows, (0, columns)), (rows[1], columns), seed, stream)
