"""The choice of the samples of a training step, by the seed and the global numbers of the samples alone.

The tasks call these with the sample numbers of a batch; each rank then cuts out its own block. The samples are
therefore the same on every grid, for any number of microbatches, and in a resumed run.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from colossal_mpi import random
from colossal_mpi.apps.data.corpus import Tokens
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout


def random_starts(first: int, stop: int, corpus: int, context: int, seed: int) -> np.ndarray:
    """Return the places in a corpus, uniformly at random, at which training sequences `first` to `stop` begin.

    Parameters
    ----------
    first, stop : int
        Half-open range of sample numbers.
    corpus : int
        Tokens of the corpus.
    context : int
        Tokens of a sequence.
    seed : int
        Seed of the run.

    Returns
    -------
    array of int64
        A place for each sequence, from 0 to ``corpus - context - 1``.
    """
    places = corpus - context
    uniform = random.uniform_block(((first, stop),), (stop,), seed, "data")
    return (uniform * places).astype(np.int64)


def even_starts(count: int, corpus: int, context: int) -> np.ndarray:
    """Return the beginnings of `count` sequences that are spread evenly over a corpus, for validation.

    Parameters
    ----------
    count : int
        Number of sequences.
    corpus : int
        Tokens of the corpus.
    context : int
        Tokens of a sequence.

    Returns
    -------
    array of int64
        A place for each sequence, in ascending order.
    """
    return np.linspace(0, corpus - context - 1, count).astype(np.int64)


def sequences(
    tokens: Tokens,
    starts: np.ndarray,
    context: int,
    grid: Grid,
    layout: Layout,
    order: np.ndarray | None = None,
    documents: np.ndarray | None = None,
) -> tuple[DistArray, DistArray]:
    """Return the inputs and labels of a language model; each rank reads its own block.

    Parameters
    ----------
    tokens : Tokens
        The corpus.
    starts : array of int64
        Where each sequence begins.
    context : int
        Tokens of a sequence.
    grid : Grid
        The grid of the arrays.
    layout : Layout
        The layout of both arrays.
    order : array of int64, optional
        Positions of a sequence in the order in which the arrays have them; ascending by default.
    documents : array of int64, ``[len(starts), context + 1]``, optional
        For each token, and the one after the sequence, the index of the first token of its document; by default a
        sequence is one document.

    Returns
    -------
    inputs : DistArray
        Shape ``[len(starts), context]``, int64.
    labels : DistArray
        The tokens after the inputs, of the same shape; -1 where the next token begins another document.
    """
    order = np.arange(context) if order is None else order

    def block(index: tuple[slice, ...], shift: int) -> np.ndarray:
        rows, columns = starts[index[0]], order[index[1]] + shift
        found = tokens[rows[:, None] + columns[None, :]].astype(np.int64)
        if shift and documents is not None:
            found[documents[index[0]][:, columns] == columns] = -1
        return found

    shape = (len(starts), context)
    inputs = from_global(lambda index: block(index, 0), grid, layout, shape)
    return inputs, from_global(lambda index: block(index, 1), grid, layout, shape)


def shuffled(first: int, stop: int, count: int, seed: int) -> np.ndarray:
    """Return the items that training samples `first` to `stop` take: each of `count` items once in an epoch.

    Parameters
    ----------
    first, stop : int
        Half-open range of sample numbers.
    count : int
        Number of items.
    seed : int
        Seed of the run.

    Returns
    -------
    array of int64
        The number of an item for each sample, from 0 to ``count - 1``.
    """
    epochs, places = np.divmod(np.arange(first, stop), count)
    return np.array([_permutation(int(e), count, seed)[at] for e, at in zip(epochs, places, strict=True)], np.int64)


@lru_cache(maxsize=2)
def _permutation(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.argsort(random.uniform_block(((0, count),), (count,), seed, f"data/{epoch}"), kind="stable")


def random_shifts(first: int, stop: int, most: int, seed: int) -> np.ndarray:
    """Return the numbers of rows and columns by which the images of some training samples are moved.

    Parameters
    ----------
    first, stop : int
        Half-open range of sample numbers.
    most : int
        Greatest number of pixels.
    seed : int
        Seed of the run.

    Returns
    -------
    array of int64
        Shape ``[stop - first, 2]``, from ``-most`` to ``most``.
    """
    uniform = random.uniform_block(((first, stop), (0, 2)), (stop, 2), seed, "data/shift")
    return (uniform * (2 * most + 1)).astype(np.int64) - most
