"""The places where the documents of a corpus start, and the documents that a sequence of tokens holds.

``corpus`` finds the places where the files tell them or a token ends each document, and the language task asks which
tokens of its samples belong together. Both are functions of arrays that every rank has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_SCANNED = 1 << 22
"""Tokens of a file that are read at a time."""


def starts_of(ends: np.ndarray, count: int) -> np.ndarray:
    """Return the places where documents start, each once, of the places where they end.

    Parameters
    ----------
    ends : array of int
        The place after the last token of each document, ascending; documents may be empty.
    count : int
        Tokens of the corpus; tokens after the last end are one more document.

    Returns
    -------
    array of int64
        Ascending places from 0 on.

    Examples
    --------
    >>> starts_of(np.array([3, 3, 5]), 7)
    array([0, 3, 5])
    """
    starts = np.unique(np.concatenate([[0], np.asarray(ends, np.int64)]))
    return starts[starts < count]


def ends_by_token(tokens: Any, end: int) -> np.ndarray:
    """Return the places where documents end that a token closes; the whole file is read, some tokens at a time.

    Parameters
    ----------
    tokens : Tokens
        The tokens.
    end : int
        The token that is the last of each document.

    Returns
    -------
    array of int64
        The place after each of these tokens.
    """
    return np.concatenate([np.zeros(0, np.int64), *_places(tokens, end)]) + 1


def _places(tokens: Any, wanted: int) -> Iterator[np.ndarray]:
    for first in range(0, len(tokens), _SCANNED):
        part = tokens[np.arange(first, min(len(tokens), first + _SCANNED))]
        yield np.flatnonzero(part == wanted) + first


def starts_in(starts: np.ndarray, numbers: np.ndarray, stretch: int) -> np.ndarray:
    """Return where documents start among some stretches of a corpus, put one after the other.

    Parameters
    ----------
    starts : array of int64
        The places where documents start in the corpus, ascending.
    numbers : array of int64
        The numbers of the stretches, ascending.
    stretch : int
        Tokens of a stretch.

    Returns
    -------
    array of int64
        Ascending places. Where stretches that are no neighbours meet, a document starts, too.

    Examples
    --------
    >>> starts_in(np.array([0, 3, 9]), np.array([0, 2]), 4)
    array([0, 3, 4, 5])
    """
    of, offset = np.divmod(starts, stretch)
    place = np.searchsorted(numbers, of)
    inside = (place < len(numbers)) & (numbers[np.minimum(place, len(numbers) - 1)] == of) if len(numbers) else of < 0
    joints = np.flatnonzero(np.diff(numbers, prepend=-2) != 1) * stretch
    return np.unique(np.concatenate([joints, place[inside] * stretch + offset[inside]]))


def documents_of(starts: np.ndarray, places: np.ndarray, length: int) -> np.ndarray:
    """Return the documents of some sequences, as the layers' ``Context.documents`` takes them.

    Parameters
    ----------
    starts : array of int64
        The places where documents start, ascending.
    places : array of int64, ``[b]``
        Where each sequence begins.
    length : int
        Tokens of a sequence.

    Returns
    -------
    array of int64, ``[b, length]``
        For each token the index, in its sequence, of the first token of its document; 0 where that begins before.

    Examples
    --------
    >>> documents_of(np.array([0, 3, 5]), np.array([1]), 5)
    array([[0, 0, 2, 2, 4]])
    """
    found = np.zeros((len(places), length), np.int64)
    low, high = np.searchsorted(starts, places, "right"), np.searchsorted(starts, places + length)
    row = np.repeat(np.arange(len(places)), high - low)
    at = starts[np.concatenate([np.zeros(0, np.int64), *map(np.arange, low, high)])] - places[row]
    found[row, at] = at
    result: np.ndarray = np.maximum.accumulate(found, axis=1)
    return result


def foreign_labels(starts: np.ndarray, places: np.ndarray, length: int) -> int:
    """Return how many tokens of some sequences are followed by a token of another document.

    Parameters
    ----------
    starts : array of int64
        The places where documents start, ascending.
    places : array of int64, ``[b]``
        Where each sequence begins.
    length : int
        Tokens of a sequence.

    Returns
    -------
    int
        The number; their labels do not count.

    Examples
    --------
    >>> foreign_labels(np.array([0, 3, 5]), np.array([1, 0]), 4)
    3
    """
    last = np.searchsorted(starts, places + length, "right")
    return int((last - np.searchsorted(starts, places, "right")).sum())
