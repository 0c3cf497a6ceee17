"""Token stores: HDF5 files with the tokens of many documents.

``colossal-mpi data prepare`` writes a store with `Writer`, and ``corpus`` reads one with `Store`, a chunk at a time.

==============  ==================================================================================================
``tokens``      all documents, one after the other, in the smallest dtype that holds every id below ``vocabulary``, in
                chunks with checksums (Fletcher-32)
``documents``   the place in ``tokens`` where each document ends, int64
``tokenizer``   the JSON of the tokenizer as bytes; absent where tokens are bytes
==============  ==================================================================================================

Attributes of the file: ``format_version``, ``vocabulary`` (one more than the greatest id of the tokenizer),
``tokenizer``, ``sources``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi.apps.data.tokenizer import Tokenizer, from_text
from colossal_mpi.checkpoint import flush
from colossal_mpi.errors import ConfigError

FORMAT_VERSION = 1
CHUNK = 1 << 16
"""Tokens of a chunk; HDF5 reads whole chunks."""
_KEPT = 64
"""Chunks that each open store keeps in memory."""
_BUFFER = 1 << 20
"""Tokens that a writer keeps before it writes them."""


def dtype_for(vocabulary: int) -> np.dtype:
    """Return the smallest dtype that holds tokens of a vocabulary."""
    return np.min_scalar_type(max(0, vocabulary - 1))


def _require_ids(tokens: np.ndarray, vocabulary: int, source: str) -> None:
    """Refuse token ids that are not from 0 to ``vocabulary - 1``."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise ConfigError(f"{source} {wrong}, and the vocabulary of {vocabulary} has ids from 0 to {vocabulary - 1}")


class Writer:
    """Writes a store, as a context manager. The file gets its name only when it is complete.

    Parameters
    ----------
    path : Path
        The file to write.
    tokenizer : Tokenizer
        The tokenizer that makes the tokens.
    sources : sequence of str
        Names of the files that the documents come from, for a reader.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, sources: Sequence[str]) -> None:
        import h5py

        self.path, self.tokens, self.documents = path, 0, 0
        self._tokenizer = tokenizer
        self._partial = path.with_name(f".{path.name}.partial")
        self._file = h5py.File(self._partial, "w", libver="v110")
        self._file.attrs.update(
            format_version=FORMAT_VERSION,
            vocabulary=tokenizer.vocabulary,
            tokenizer=tokenizer.name,
        )
        self._file.attrs["sources"] = list(sources)[:256] or [""]
        if tokenizer.text:
            self._file["tokenizer"] = np.frombuffer(tokenizer.text.encode(), np.uint8)
        dtype = dtype_for(tokenizer.vocabulary)
        self._datasets = {
            name: self._file.create_dataset(name, (0,), kind, chunks=(chunk,), maxshape=(None,), fletcher32=True)
            for name, kind, chunk in (("tokens", dtype, CHUNK), ("documents", np.dtype(np.int64), 1 << 12))
        }
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in self._datasets}
        self._count = dict.fromkeys(self._datasets, 0)

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens to the document that is being written.

        Raises
        ------
        ConfigError
            If an id does not fit into the vocabulary of the tokenizer.
        """
        _require_ids(tokens, self._tokenizer.vocabulary, f"the tokenizer {self._tokenizer.name} gave the token")
        self.tokens += len(tokens)
        self._put("tokens", tokens)

    def end(self) -> None:
        """End the document that is being written."""
        self.documents += 1
        self._put("documents", np.array([self.tokens], np.int64))

    def _put(self, name: str, values: np.ndarray) -> None:
        self._waiting[name].append(values.astype(self._datasets[name].dtype))
        self._count[name] += len(values)
        if self._count[name] >= _BUFFER or len(self._waiting[name]) >= _BUFFER // 64:
            self._write(name)

    def _write(self, name: str) -> None:
        if self._count[name]:
            dataset, values = self._datasets[name], np.concatenate(self._waiting[name])
            dataset.resize((dataset.shape[0] + len(values),))
            dataset[-len(values) :] = values
        self._waiting[name], self._count[name] = [], 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for name in self._datasets:
                    self._write(name)
            self._file.close()
            if kind is None:
                flush(self._partial)
                os.replace(self._partial, self.path)
                flush(self.path.parent)
        finally:
            self._partial.unlink(missing_ok=True)


class Store:
    """A store that is open for reading; ``store[places]`` reads the tokens at an array of places.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    ConfigError
        If the file is no store, or has a newer format.
    """

    def __init__(self, path: str | Path) -> None:
        import h5py

        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"data.files: cannot read {path}: No such file")
        try:
            self._file: Any = h5py.File(path, "r")
        except OSError as problem:
            reason = "it is no HDF5 file" if "signature" in str(problem) else problem
            raise ConfigError(f"data.files: cannot read {path}: {reason}") from None
        attributes = dict(self._file.attrs)
        tokens, documents = (self._dataset(h5py, name) for name in ("tokens", "documents"))
        if tokens is None or documents is None or "vocabulary" not in attributes:
            raise ConfigError(f"data.files: {path} is no token store: make one with colossal-mpi data prepare")
        if attributes.get("format_version", 0) > FORMAT_VERSION:
            raise ConfigError(
                f"data.files: {path} is of format {attributes['format_version']}; this version reads {FORMAT_VERSION}"
            )
        self.tokens, self.documents = tokens, documents
        self.vocabulary, self.name = int(attributes["vocabulary"]), str(attributes["tokenizer"])
        self.sources = [str(name) for name in attributes.get("sources", [])]
        self._chunk = lru_cache(_KEPT)(self._read)

    def _dataset(self, h5py: Any, name: str) -> Any:
        """Return a dataset of integers in one dim that lies in this file itself; None if there is no such dataset."""
        link = self._file.get(name, getlink=True)
        found: Any = self._file[name] if isinstance(link, h5py.HardLink) else None
        fits = isinstance(found, h5py.Dataset) and not found.is_virtual and not found.external
        return found if fits and found.ndim == 1 and found.dtype.kind in "iu" else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; an error if the store was made for a smaller vocabulary."""
        text = bytes(self._file["tokenizer"][...]).decode() if "tokenizer" in self._file else ""
        found = from_text(self.name, text)
        if found.vocabulary > self.vocabulary:
            raise ConfigError(
                f"data.files: {self.path} was made for a vocabulary of {self.vocabulary}, and the ids of its tokenizer "
                f"go to {found.vocabulary - 1}: make the store again with colossal-mpi data prepare --overwrite"
            )
        return found

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a token."""
        dtype: np.dtype = self.tokens.dtype
        return dtype

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def _read(self, number: int) -> np.ndarray:
        try:
            chunk: np.ndarray = self.tokens[number * CHUNK : (number + 1) * CHUNK]
        except OSError as problem:
            raise ConfigError(
                f"data.files: {self.path} is damaged in the tokens from {number * CHUNK} on: {problem}"
            ) from None
        _require_ids(chunk, self.vocabulary, f"data.files: {self.path} holds the token")
        return chunk

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        # Chunks are read as a whole, and the last few are kept.
        flat = np.asarray(places, np.int64).reshape(-1)
        found = np.empty(flat.shape, self.dtype)
        chunks = flat // CHUNK
        for number in np.unique(chunks):
            here = chunks == number
            found[here] = self._chunk(int(number))[flat[here] - number * CHUNK]
        return found.reshape(np.shape(places))

    def document(self, number: int, most: int) -> np.ndarray:
        """Return the first tokens of a document, at most `most`."""
        start = int(self.documents[number - 1]) if number else 0
        tokens: np.ndarray = self.tokens[start : min(int(self.documents[number]), start + most)]
        return tokens
