"""Tokens, split into training and validation, and the order of samples by their global number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import comm, random
from colossal_mpi.apps.data.store import Store
from colossal_mpi.apps.data.tokenizer import Bytes, Tokenizer
from colossal_mpi.apps.data.tokens import Stretches, is_stored, open_files
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout

_STRETCH = 4096
"""Tokens that are held out together."""


@dataclass(frozen=True)
class Corpus:
    """Token ids: those to train on and those held out, as arrays or as what reads them from a disk."""

    train: Any
    validation: Any
    vocabulary: int = 256
    """One more than the greatest token."""
    tokenizer: Tokenizer = field(default_factory=Bytes)
    words: str = ""
    """What is known of tokens on a disk, for a reader."""

    @property
    def about(self) -> str:
        """Its size, and the loss of a guess from the frequencies of bytes alone, for a reader."""
        if self.words:
            return f"{len(self.train):,} tokens to train on, {len(self.validation):,} held out{self.words}"
        share = np.bincount(self.train) / len(self.train)
        entropy = -sum(p * np.log(p) for p in share if p)
        size = f"{len(self.train):,} bytes of text, {len(self.validation):,} held out"
        return f"{size}; entropy of a byte {entropy:.2f} nats"


def read_corpus(files: Sequence[str], validation: float, context: int, grid: Grid) -> Corpus:
    """Return the corpus: text read by rank 0 and sent to the others, or tokens that each rank reads when it needs them.

    Parameters
    ----------
    files : sequence of str
        Text files, in order, or token stores (``.h5``) and NumPy files of tokens (``.npy``); none means CPython's own
        documentation, which every Python carries.
    validation : float
        Share that is held out.
    context : int
        Tokens per sequence; both parts must hold one and its next token.
    grid : Grid

    **Communication:** of texts, one bcast of the corpus, in bytes; of tokens on a disk small messages.

    Raises
    ------
    ConfigError
        On all ranks, if a file cannot be read or the corpus is too short.
    """
    corpus = _planned(tuple(files), validation) if grid.is_meta else _corpus(files, validation, grid)
    if min(len(corpus.train), len(corpus.validation)) <= context:
        size, unit = len(corpus.train) + len(corpus.validation), "tokens" if corpus.words else "bytes"
        raise ConfigError(
            f"the corpus has {size} {unit}, {len(corpus.validation)} of them for validation: both parts must have more "
            f"than model.context={context}; give more text or a smaller context"
        )
    return corpus


def _corpus(files: Sequence[str], validation: float, grid: Grid) -> Corpus:
    return _stored(files, validation, grid) if is_stored(files) else _texts(files, validation, grid)


@lru_cache(maxsize=1)
def _planned(files: tuple[str, ...], validation: float) -> Corpus:
    """Return the corpus of meta grids: the dry runs of a plan, hundreds of them, read it once."""
    return _corpus(files, validation, Grid.meta())


def _texts(files: Sequence[str], validation: float, grid: Grid) -> Corpus:
    text = b""
    with comm.agreed(grid):
        if grid.rank == 0:
            text = _read(files)
    size = comm.share(len(text), grid)
    tokens = np.frombuffer(text, np.uint8) if grid.rank == 0 else np.empty(size, np.uint8)
    tokens = comm.bcast(tokens, grid, tuple(grid.axes))
    return split(tokens, validation)


def _stored(files: Sequence[str], validation: float, grid: Grid) -> Corpus:
    tokens, vocabulary, tokenizer, words = open_files(files, grid)
    stretch, held = _held(len(tokens), validation)
    train, kept = (Stretches(tokens, np.flatnonzero(some), stretch) for some in (~held, held))
    return Corpus(train, kept, vocabulary, tokenizer, words)


def split(tokens: np.ndarray, validation: float) -> Corpus:
    """Hold out a share of a corpus, in stretches spread evenly over it.

    The end alone would be a sample of its own: that of CPython's documentation has a bigram entropy of 2.14 nats
    per byte against 2.45 of the whole.
    """
    stretch, held = _held(len(tokens), validation)
    mask = held[np.arange(len(tokens)) // stretch]
    return Corpus(tokens[~mask], tokens[mask])


def _held(count: int, validation: float) -> tuple[int, np.ndarray]:
    """Return the length of a stretch, and of each whether it is held out."""
    stretch = max(1, min(_STRETCH, int(count * validation)))
    number = np.arange(-(-count // stretch))
    # Stretch i is held out where the whole part of (i + 1) x share steps up; the tiny term is for shares like 0.1.
    return stretch, np.floor((number + 1) * validation + 1e-9) > np.floor(number * validation + 1e-9)


def require_vocabulary(corpus: Corpus, most: int, remedy: str) -> None:
    """Refuse a corpus that has more kinds of tokens than a model.

    Raises
    ------
    ConfigError
    """
    if corpus.vocabulary > most:
        raise ConfigError(f"data.files: tokens of a vocabulary of {corpus.vocabulary}, and {remedy}")


def stored_vocabulary(files: Sequence[str], least: int) -> int:
    """Return the vocabulary of stores, or `least` where there are only arrays of tokens, which do not know theirs.

    Raises
    ------
    ConfigError
        If a store cannot be read.
    """
    return max((Store(name).vocabulary for name in files if name.endswith(".h5")), default=least)


def _read(files: Sequence[str]) -> bytes:
    if not files:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics)).encode()
    pieces = []
    for name in files:
        try:
            pieces.append(Path(name).read_bytes())
        except OSError as problem:
            raise ConfigError(f"data.files: cannot read {name}: {problem.strerror}") from None
    return b"\n".join(pieces)


def sample_starts(first: int, stop: int, corpus: int, context: int, seed: int) -> np.ndarray:
    """Return where the training sequences number `first` to `stop` begin: a function of seed and number alone."""
    places = corpus - context
    unit = random.uniform_block(((first, stop),), (stop,), seed, "data")
    return (unit * places).astype(np.int64)


def spread_starts(count: int, corpus: int, context: int) -> np.ndarray:
    """Return `count` beginnings spread evenly over a corpus."""
    return np.linspace(0, corpus - context - 1, count).astype(np.int64)


def shuffled(first: int, stop: int, count: int, seed: int) -> np.ndarray:
    """Return which of `count` items the training samples number `first` to `stop` are: each once in an epoch."""
    epochs, places = np.divmod(np.arange(first, stop), count)
    return np.array([_order(int(e), count, seed)[at] for e, at in zip(epochs, places, strict=True)], np.int64)


@lru_cache(maxsize=2)
def _order(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.argsort(random.uniform_block(((0, count),), (count,), seed, f"data/{epoch}"), kind="stable")


def shifts(first: int, stop: int, most: int, seed: int) -> np.ndarray:
    """Return by how many rows and columns, ``[n, 2]``, the images of some training samples are moved."""
    unit = random.uniform_block(((first, stop), (0, 2)), (stop, 2), seed, "data/shift")
    return (unit * (2 * most + 1)).astype(np.int64) - most


def sequences(
    tokens: np.ndarray, starts: np.ndarray, context: int, grid: Grid, layout: Layout, order: np.ndarray | None = None
) -> tuple[DistArray, DistArray]:
    """Return inputs and labels ``[len(starts), context]``, in an order; each rank cuts out only its own."""
    order = np.arange(context) if order is None else order

    def cut(index: tuple[slice, ...], shift: int) -> np.ndarray:
        rows, columns = starts[index[0]], order[index[1]] + shift
        return tokens[rows[:, None] + columns[None, :]].astype(np.int64)

    shape = (len(starts), context)
    return tuple(from_global(lambda index, s=s: cut(index, s), grid, layout, shape) for s in (0, 1))  # type: ignore
