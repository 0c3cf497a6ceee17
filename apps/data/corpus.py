"""The corpus of a run: token ids in memory or on a disk, split into tokens to train on and held-out tokens.

Tasks that read text call `read_corpus`. Text files are read by rank 0 and broadcast; token stores (``store``) and NumPy
files and other binaries of tokens stay on the disk, and each rank reads the tokens that its samples need. ``formats``
tells which is which.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np

from colossal_mpi import comm
from colossal_mpi.apps.data.digest import digest_of
from colossal_mpi.apps.data.documents import ends_by_token, starts_in, starts_of
from colossal_mpi.apps.data.formats import BINARY, STORE, Format, is_store, megatron_ends, recognize
from colossal_mpi.apps.data.store import Store
from colossal_mpi.apps.data.texts import pieces
from colossal_mpi.apps.data.tokenizer import Bytes, Tokenizer
from colossal_mpi.errors import ConfigError
from colossal_mpi.files import open_regular
from colossal_mpi.grid import Grid

_STRETCH = 4096
"""Number of consecutive tokens that are held out together."""
_SCANNED = 1 << 22
"""Number of tokens of a NumPy file that are read at a time to find the greatest."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of a run.

    Parameters
    ----------
    train, validation : Tokens
        Token ids to train on, and held-out ones.
    vocabulary : int
        One more than the greatest token that may occur.
    tokenizer : Tokenizer
        The tokenizer that made the tokens.
    source : str
        For tokens on a disk, the end of the sentence that describes them to a reader; ``""`` for text in memory.
    digest : str
        The digest of both parts, ``""`` where a meta grid has no use for it.
    train_starts, validation_starts : array of int64, optional
        Where documents start among the tokens of each part, ascending; None: they are not kept apart.
    """

    train: Tokens
    validation: Tokens
    vocabulary: int = 256
    tokenizer: Tokenizer = field(default_factory=Bytes)
    source: str = ""
    digest: str = ""
    train_starts: np.ndarray | None = None
    validation_starts: np.ndarray | None = None

    @property
    def about(self) -> str:
        """The size, and for text the loss in nats of guessing from the frequencies of bytes alone, for a reader."""
        if self.source:
            return f"{len(self.train):,} tokens to train on, {len(self.validation):,} held out{self.source}"
        share = np.bincount(np.asarray(self.train)) / len(self.train)
        entropy = -sum(p * np.log(p) for p in share if p)
        size = f"{len(self.train):,} bytes of text, {len(self.validation):,} held out"
        return f"{size}; entropy of a byte {entropy:.2f} nats"


def read_corpus(
    files: Sequence[str],
    validation: float,
    context: int,
    grid: Grid,
    choice: str = "auto",
    dtype: str = "",
    *,
    separate: bool = False,
    end: int | None = None,
) -> Corpus:
    """Return the corpus that some files hold.

    Parameters
    ----------
    files : sequence of str
        Text files, in order, or token stores (``.h5``), NumPy files (``.npy``) and other files of tokens. Without any,
        the corpus is CPython's own documentation, which every Python carries.
    validation : float
        Share of the tokens that is held out.
    context : int
        Tokens of a sequence; both parts must hold one and its next token.
    grid : Grid
        All ranks of the run.
    choice : str
        ``text`` or ``jsonl`` where files are to be taken as such; ``auto`` goes by name and content.
    dtype : str
        The dtype of the tokens of files without a header; ``""`` if they are texts.
    separate : bool
        Whether to find where documents start.
    end : int, optional
        The token that ends a document in files of tokens that do not say where documents end.

    Returns
    -------
    Corpus
        The tokens of text in memory, on every rank; stores and NumPy files opened on every rank.

    Raises
    ------
    ConfigError
        On all ranks, if a file cannot be read, is in no format that is known, or the corpus is too short, or if it does
        not say where documents end and no token does.

    Notes
    -----
    **Communication:** for text files, one bcast of the corpus from rank 0 over the grid, in bytes; for stores and NumPy
    files, messages of a few bytes. With `separate`, 8 bytes more for each document.
    """
    options = validation, choice, dtype, separate, end
    corpus = _meta_corpus(tuple(files), *options) if grid.is_meta else _open(files, grid, *options)
    if min(len(corpus.train), len(corpus.validation)) <= context:
        size, unit = len(corpus.train) + len(corpus.validation), "tokens" if corpus.source else "bytes"
        raise ConfigError(
            f"the corpus has {size} {unit}, {len(corpus.validation)} of them for validation: both parts must have more "
            f"than model.context={context}; give more text or a smaller context"
        )
    return corpus if grid.is_meta else replace(corpus, digest=_digest(corpus, grid))


def _digest(corpus: Corpus, grid: Grid) -> str:
    found = ""
    with comm.agreed(grid):
        if grid.rank == 0:
            starts = (corpus.train_starts, corpus.validation_starts)
            found = digest_of((corpus.train, corpus.validation, *(one for one in starts if one is not None)))
    shared: str = comm.share(found, grid)
    return shared


@lru_cache(maxsize=1)
def _meta_corpus(
    files: tuple[str, ...], validation: float, choice: str, dtype: str, separate: bool, end: int | None
) -> Corpus:
    """Return the corpus of meta grids: hundreds of dry runs of a plan read it once."""
    return _open(files, Grid.meta(), validation, choice, dtype, separate, end)


def _open(
    files: Sequence[str], grid: Grid, validation: float, choice: str, dtype: str, separate: bool, end: int | None
) -> Corpus:
    formats: list[Format] = []
    with comm.agreed(grid):
        if grid.rank == 0:
            formats = _formats(files, choice, dtype)
    formats = comm.share(formats, grid)
    if any(not one.is_text for one in formats):
        corpus, tokens = _read_stored(files, formats, validation, grid)
        ends = _shared(lambda: _stored_ends(files, formats, tokens, end), grid) if separate else None
    else:
        corpus, ends = _read_texts(files, formats, validation, grid, separate)
    if ends is None:
        return corpus
    count = len(corpus.train) + len(corpus.validation)
    stretch, held = _held_out(count, validation)
    starts = starts_of(ends, count)
    train, kept = (starts_in(starts, np.flatnonzero(chosen), stretch) for chosen in (~held, held))
    return replace(corpus, train_starts=train, validation_starts=kept)


def _shared(find: Callable[[], np.ndarray], grid: Grid) -> np.ndarray:
    """Return on every rank an array that rank 0 finds."""
    found = np.zeros(0, np.int64)
    with comm.agreed(grid, ConfigError):
        if grid.rank == 0:
            found = find()
    size = comm.share(len(found), grid)
    # ends[n] on rank 0  ->  ends[n] on every rank: bcast over all axes
    shared: np.ndarray = comm.bcast(found if grid.rank == 0 else np.empty(size, np.int64), grid, tuple(grid.axes))
    return shared


def _stored_ends(files: Sequence[str], formats: Sequence[Format], tokens: Concatenated, end: int | None) -> np.ndarray:
    """Return where the documents of files of tokens end, one file after the other; each file ends one."""
    found, first = [], 0
    for name, one, part in zip(files, formats, tokens.parts, strict=True):
        ends = part.ends() if isinstance(part, Store) else megatron_ends(Path(name)) if one.offset == 0 else None
        if ends is None and end is None:
            raise ConfigError(
                f"data.files: {name} does not say where documents end, which data.documents='separate' needs: give "
                "data.end_token, such as 50256 for tokens of GPT-2, or make a store with colossal-mpi data prepare"
            )
        if ends is None:
            ends = ends_by_token(part, int(end or 0))
        found += [ends.astype(np.int64) + first, np.array([first + len(part)])]
        first += len(part)
    return np.concatenate(found)


def _formats(files: Sequence[str], choice: str, dtype: str) -> list[Format]:
    try:
        formats = [recognize(Path(name), choice, dtype) for name in files]
    except ConfigError as problem:
        raise ConfigError(f"data.files: {problem}") from None
    texts = [name for name, one in zip(files, formats, strict=True) if one.is_text]
    stored = [name for name in files if name not in texts]
    if texts and stored:
        raise ConfigError(
            f"data.files: {stored[0]} holds tokens and {texts[0]} text: put the texts into a store with colossal-mpi "
            "data prepare"
        )
    return formats


def _read_texts(
    files: Sequence[str], formats: Sequence[Format], validation: float, grid: Grid, separate: bool
) -> tuple[Corpus, np.ndarray | None]:
    documents: list[bytes] = []
    with comm.agreed(grid):
        if grid.rank == 0:
            documents = _documents_of(files, formats)
    text = b"\n".join(documents)
    # the line feed between two documents belongs to the first
    ends = _shared(lambda: np.cumsum([len(one) + 1 for one in documents]), grid) if separate else None
    size = comm.share(len(text), grid)
    tokens = np.frombuffer(text, np.uint8) if grid.rank == 0 else np.empty(size, np.uint8)
    # tokens[n] on rank 0  ->  tokens[n] on every rank: bcast over all axes
    tokens = comm.bcast(tokens, grid, tuple(grid.axes))
    return split(tokens, validation), ends


def _documents_of(files: Sequence[str], formats: Sequence[Format]) -> list[bytes]:
    if not files:
        from pydoc_data.topics import topics

        return [topics[name].encode() for name in sorted(topics)]
    documents: list[bytes] = []
    parts: list[bytes] = []
    try:
        for name, one in zip(files, formats, strict=True):
            for part, ends, _ in pieces(Path(name), one):
                parts.append(part)
                if ends:
                    documents.append(b"".join(parts))
                    parts = []
    except ConfigError as problem:
        raise ConfigError(f"data.files: {problem}") from None
    return documents


def split(tokens: np.ndarray, validation: float) -> Corpus:
    """Hold out a share of a corpus in memory, in stretches spread evenly over it.

    The end of a corpus may differ from the rest: the end of CPython's documentation has a bigram entropy of 2.14 nats
    per byte, the whole has 2.45.
    """
    stretch, held = _held_out(len(tokens), validation)
    mask = held[np.arange(len(tokens)) // stretch]
    return Corpus(tokens[~mask], tokens[mask])


def _held_out(count: int, validation: float) -> tuple[int, np.ndarray]:
    """Return the length of a stretch, and for each stretch whether it is held out."""
    stretch = max(1, min(_STRETCH, int(count * validation)))
    number = np.arange(-(-count // stretch))
    # Stretch i is held out where the whole part of (i + 1) x share steps up; the tiny term is for shares like 0.1.
    return stretch, np.floor((number + 1) * validation + 1e-9) > np.floor(number * validation + 1e-9)


def require_vocabulary(corpus: Corpus, most: int, remedy: str) -> None:
    """Refuse a corpus whose vocabulary is larger than a model's.

    Parameters
    ----------
    corpus : Corpus
        The corpus.
    most : int
        Vocabulary of the model.
    remedy : str
        The end of the message: what would work.

    Raises
    ------
    ConfigError
        If the vocabulary of the corpus is larger than `most`.
    """
    if corpus.vocabulary > most:
        raise ConfigError(f"data.files: tokens of a vocabulary of {corpus.vocabulary}, and {remedy}")


def stored_vocabulary(files: Sequence[str], default: int) -> int:
    """Return the largest vocabulary of some stores.

    Parameters
    ----------
    files : sequence of str
        The files of ``data.files``.
    default : int
        The result where no file is a store: other files do not know their vocabulary.

    Returns
    -------
    int
        Number of tokens.

    Raises
    ------
    ConfigError
        If a store cannot be read.
    """
    return max((Store(name).vocabulary for name in files if is_store(Path(name))), default=default)


def _read_stored(
    files: Sequence[str], formats: Sequence[Format], validation: float, grid: Grid
) -> tuple[Corpus, Concatenated]:
    with comm.agreed(grid, ConfigError):
        pairs = zip(files, formats, strict=True)
        opened = [Store(name) if one.name == STORE else NumpyTokens(name, one) for name, one in pairs]
    arrays = 0
    with comm.agreed(grid, ConfigError):
        if grid.rank == 0:
            arrays = max((one.vocabulary() for one in opened if isinstance(one, NumpyTokens)), default=0)
    stores = [one for one in opened if isinstance(one, Store)]
    kinds = {(store.name, store.vocabulary) for store in stores}
    if len(kinds) > 1:
        raise ConfigError(f"data.files: stores of several tokenizers, {sorted(kinds)}: they must be of one")
    vocabulary = max(comm.share(arrays, grid), *(store.vocabulary for store in stores), 1)
    documents = sum(store.documents.shape[0] for store in stores)
    with comm.agreed(grid, ConfigError):
        for store in stores:
            if grid.rank == 0 and not grid.is_meta and not store.has_checksums:
                sys.stderr.write(
                    f"colossal_mpi: warning: {store.path} lacks checksums: some damage would not be found; make it "
                    "again with colossal-mpi data prepare --overwrite\n"
                )
        tokenizer: Tokenizer = stores[0].tokenizer if stores else Bytes()
    tokens = Concatenated(opened)
    stretch, held = _held_out(len(tokens), validation)
    train, kept = (Stretches(tokens, np.flatnonzero(chosen), stretch) for chosen in (~held, held))
    source = f"{f' of {documents:,} documents' if stores else ''}, vocabulary {vocabulary:,}"
    return Corpus(train, kept, vocabulary, tokenizer, source), tokens


class Concatenated:
    """Several sequences of tokens, one after the other.

    Parameters
    ----------
    parts : sequence of Tokens
        The sequences, in order.
    """

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts, self._ends = list(parts), np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        flat = np.asarray(places, np.int64).reshape(-1)
        found, which = np.empty(flat.shape, np.int64), np.searchsorted(self._ends, flat, side="right")
        for i in np.unique(which):
            here = which == i
            found[here] = self.parts[i][flat[here] - (self._ends[i - 1] if i else 0)]
        return found.reshape(np.shape(places))


class Stretches:
    """Some stretches of a sequence of tokens, one after the other.

    Parameters
    ----------
    tokens : Tokens
        The sequence.
    numbers : array of int64
        The numbers of the stretches, in ascending order.
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


class NumpyTokens:
    """The tokens of a NumPy file or of another binary file, which is mapped into memory and not read.

    Parameters
    ----------
    path : str
        A ``.npy`` file, or a file of tokens.
    kind : Format
        The format of the file.

    Raises
    ------
    ConfigError
        If the file cannot be read, or holds something else than integers in one dim.
    """

    def __init__(self, path: str, kind: Format) -> None:
        self._array: np.ndarray
        try:
            open_regular(path).close()
            if kind.name != BINARY:
                self._array = np.load(path, mmap_mode="r", allow_pickle=False)
            elif Path(path).stat().st_size > kind.offset:
                self._array = np.memmap(path, np.dtype(kind.dtype), "r", kind.offset)
            else:
                self._array = np.empty(0, kind.dtype)
        except OSError as problem:
            raise ConfigError(f"data.files: cannot read {path}: {problem.strerror or problem}") from None
        except Exception as problem:  # of the header: whatever NumPy raises for absurd shapes and dtypes
            raise ConfigError(f"data.files: {path} is no .npy file of tokens: {problem}") from None
        if self._array.ndim != 1 or self._array.dtype.kind not in "iu":
            shape = "x".join(map(str, self._array.shape))
            raise ConfigError(f"data.files: {path} holds {self._array.dtype} {shape}: it must be integers in one dim")
        self.path = path

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._array[places]
        return found

    def vocabulary(self) -> int:
        """Return one more than the greatest token; the whole file is read, some tokens at a time.

        Raises
        ------
        ConfigError
            If a number is negative.
        """
        parts = [self._array[i : i + _SCANNED] for i in range(0, len(self), _SCANNED)]
        if any(part.min() < 0 for part in parts):
            raise ConfigError(f"data.files: {self.path} holds numbers below 0, which are no tokens")
        return max((int(part.max()) + 1 for part in parts), default=0)


Tokens: TypeAlias = np.ndarray | Store | NumpyTokens | Concatenated | Stretches
"""A sequence of token ids, in memory or on a disk; it has a length, and takes an array of places as its index."""
