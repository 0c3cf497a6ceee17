"""Bytes of text, split into training and validation, and the order of samples by their global number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from colossal_mpi import comm, random
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout

_STRETCH = 4096
"""Bytes of text that are held out together."""


@dataclass(frozen=True)
class Corpus:
    """Token ids (bytes): those to train on and those held out."""

    train: np.ndarray
    validation: np.ndarray

    @property
    def about(self) -> str:
        """Its size, and the loss of a guess from the frequencies of bytes alone, for a reader."""
        share = np.bincount(self.train) / len(self.train)
        entropy = -sum(p * np.log(p) for p in share if p)
        size = f"{len(self.train):,} bytes of text, {len(self.validation):,} held out"
        return f"{size}; entropy of a byte {entropy:.2f} nats"


def read_corpus(files: Sequence[str], validation: float, context: int, grid: Grid) -> Corpus:
    """Return the corpus, read by rank 0 and sent to the others.

    Parameters
    ----------
    files : sequence of str
        Text files, in order; none means CPython's own documentation, which every Python carries.
    validation : float
        Share that is held out.
    context : int
        Tokens per sequence; both parts must hold one and its next token.
    grid : Grid

    **Communication:** one bcast of the corpus, in bytes.

    Raises
    ------
    ConfigError
        On all ranks, if a file cannot be read or the corpus is too short.
    """
    text = b""
    with comm.agreed(grid):
        if grid.rank == 0:
            text = _read(files)
    size = comm.share(len(text), grid)
    tokens = np.frombuffer(text, np.uint8) if grid.rank == 0 else np.empty(size, np.uint8)
    tokens = comm.bcast(tokens, grid, tuple(grid.axes))
    corpus = split(tokens, validation)
    if min(len(corpus.train), len(corpus.validation)) <= context:
        raise ConfigError(
            f"the corpus has {size} bytes, {len(corpus.validation)} of them for validation: both parts must have more "
            f"than model.context={context}; give more text or a smaller context"
        )
    return corpus


def split(tokens: np.ndarray, validation: float) -> Corpus:
    """Hold out a share of a corpus, in stretches spread evenly over it.

    The end alone would be a sample of its own: that of CPython's documentation has a bigram entropy of 2.14 nats
    per byte against 2.45 of the whole.
    """
    stretch = max(1, min(_STRETCH, int(len(tokens) * validation)))
    number = np.arange(len(tokens)) // stretch
    # Stretch i is held out where the whole part of (i + 1) x share steps up; the tiny term is for shares like 0.1.
    held = np.floor((number + 1) * validation + 1e-9) > np.floor(number * validation + 1e-9)
    return Corpus(tokens[~held], tokens[held])


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
