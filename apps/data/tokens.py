"""Tokens on a disk, in stores and NumPy files, of which each rank reads what its samples need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from colossal_mpi import comm
from colossal_mpi.apps.data.store import Store
from colossal_mpi.apps.data.tokenizer import Bytes, Tokenizer
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid

SUFFIXES = (".h5", ".npy")
_PIECE = 1 << 22  # tokens that are looked at together


class Tokens(Protocol):
    """A sequence of tokens: an array in memory, or one on a disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Any) -> np.ndarray: ...


class Joined:
    """Several sequences of tokens, one after the other."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self._parts, self._ends = list(parts), np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        flat = np.asarray(places, np.int64).reshape(-1)
        found, which = np.empty(flat.shape, np.int64), np.searchsorted(self._ends, flat, side="right")
        for i in np.unique(which):
            here = which == i
            found[here] = self._parts[i][flat[here] - (self._ends[i - 1] if i else 0)]
        return found.reshape(np.shape(places))


class Stretches:
    """Some stretches of a sequence of tokens, one after the other.

    Parameters
    ----------
    tokens : Tokens
    numbers : array of int64
        Which stretches, in ascending order.
    stretch : int
        Tokens of one; the last of the sequence may have fewer.
    """

    def __init__(self, tokens: Tokens, numbers: np.ndarray, stretch: int) -> None:
        self._tokens, self._numbers, self._stretch = tokens, numbers, stretch
        last = len(numbers) and min(stretch, len(tokens) - int(numbers[-1]) * stretch)
        self._length = max(0, len(numbers) - 1) * stretch + last

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        number, offset = np.divmod(np.asarray(places, np.int64), self._stretch)
        return self._tokens[self._numbers[number] * self._stretch + offset]


class Array:
    """Tokens of a NumPy file, which is mapped and not read.

    Raises
    ------
    ConfigError
        If it holds something else than integers in one dim.
    """

    def __init__(self, path: str) -> None:
        try:
            self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as problem:
            raise ConfigError(f"data.files: cannot read {path}: {problem.strerror or problem}") from None
        except ValueError as problem:
            raise ConfigError(f"data.files: {path} is no .npy file of tokens: {problem}") from None
        if self._array.ndim != 1 or self._array.dtype.kind not in "iu":
            shape = "x".join(map(str, self._array.shape))
            raise ConfigError(f"data.files: {path} holds {self._array.dtype} {shape}: it must be integers in one dim")
        self.path = path

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._array[places]

    def vocabulary(self) -> int:
        """Return one more than the greatest token; the whole file is read, a piece at a time."""
        pieces = [self._array[i : i + _PIECE] for i in range(0, len(self), _PIECE)]
        if any(piece.min() < 0 for piece in pieces):
            raise ConfigError(f"data.files: {self.path} holds numbers below 0, which are no tokens")
        return max((int(piece.max()) + 1 for piece in pieces), default=0)


def is_stored(files: Sequence[str]) -> bool:
    """Say whether files are stores or arrays of tokens, and not texts.

    Raises
    ------
    ConfigError
        If some are and others are not.
    """
    stored = [name for name in files if Path(name).suffix in SUFFIXES]
    if stored and len(stored) < len(files):
        texts = [name for name in files if name not in stored]
        raise ConfigError(
            f"data.files: {stored[0]} holds tokens and {texts[0]} text: put the texts into a store with colossal-mpi "
            "data prepare"
        )
    return bool(stored)


def open_files(files: Sequence[str], grid: Grid) -> tuple[Tokens, int, Tokenizer, str]:
    """Return the tokens of stores and arrays, their vocabulary and tokenizer, and what they are in words.

    Raises
    ------
    ConfigError
        On all ranks, if a file cannot be read or two are of different tokenizers.
    """
    with comm.agreed(grid, ConfigError):
        opened = [Store(name) if name.endswith(".h5") else Array(name) for name in files]
    with comm.agreed(grid, ConfigError):
        arrays = max((one.vocabulary() for one in opened if isinstance(one, Array)), default=0) if not grid.rank else 0
    stores = [one for one in opened if isinstance(one, Store)]
    kinds = {(store.name, store.vocabulary) for store in stores}
    if len(kinds) > 1:
        raise ConfigError(f"data.files: stores of several tokenizers, {sorted(kinds)}: they must be of one")
    vocabulary = max(comm.share(arrays, grid), *(store.vocabulary for store in stores), 1)
    documents = sum(store.documents.shape[0] for store in stores)
    with comm.agreed(grid, ConfigError):
        tokenizer: Tokenizer = stores[0].tokenizer if stores else Bytes()
    words = f" of {documents:,} documents" if stores else ""
    return Joined(opened), vocabulary, tokenizer, f"{words}, vocabulary {vocabulary:,}"
