"""Token stores: HDF5 files with the tokens of many documents.

``colossal-mpi data prepare`` writes a store with `Writer`, and ``corpus`` reads one with `Store`, a chunk at a time.

==============  ==================================================================================================
``tokens``      all documents, one after the other, in the smallest dtype that holds every id below ``vocabulary``, in
                chunks with checksums (Fletcher-32)
``documents``   the place in ``tokens`` where each document ends, int64
``tokenizer``   the JSON of the tokenizer as bytes, with a checksum; absent where tokens are bytes
==============  ==================================================================================================

Attributes of the file: ``format_version``, ``vocabulary`` (one more than the greatest id of the tokenizer),
``tokenizer``, ``sources``, and ``crc32``, the checksum of these two: HDF5 has none for texts.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from colossal_mpi import files
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
        self.path, self.tokens, self.documents = path, 0, 0
        self._tokenizer = tokenizer
        self._partial = path.with_name(f".{path.name}.partial")
        self._partial.unlink(missing_ok=True)
        self._output = files.Hdf5Output(self._partial)
        self._file = self._output.file
        named = [name.encode(errors="replace").decode() for name in (tokenizer.name, *list(sources)[:256])]
        self._file.attrs.update(
            format_version=FORMAT_VERSION,
            vocabulary=tokenizer.vocabulary,
            tokenizer=named[0],
            crc32=_checksum(named[0], named[1:] or [""]),
        )
        self._file.attrs["sources"] = named[1:] or [""]
        if tokenizer.text:
            text = np.frombuffer(tokenizer.text.encode(), np.uint8)
            self._file.create_dataset("tokenizer", data=text, chunks=(min(text.size, CHUNK),), fletcher32=True)
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
            self._output.require_room()
        self._waiting[name], self._count[name] = [], 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for name in self._datasets:
                    self._write(name)
            self._output.close()
            if kind is None:
                os.replace(self._partial, self.path)
                flush(self.path.parent)
        finally:
            self._partial.unlink(missing_ok=True)


def _checksum(name: str, sources: Sequence[str]) -> int:
    return zlib.crc32("\0".join([name, *sources]).encode())


class _Attributes(BaseModel):
    """The attributes of a store, of the types that they must have."""

    model_config = ConfigDict(strict=True)

    format_version: int = Field(ge=0)
    vocabulary: int = Field(ge=1, le=1 << 31)
    tokenizer: str
    sources: list[str] = []
    crc32: int | None = None


class Store:
    """A store that is open for reading; ``store[places]`` reads the tokens at an array of places.

    Parameters
    ----------
    path : str or Path
        The file.

    Raises
    ------
    ConfigError
        If the file is no store, is damaged, has a newer format, or leads to other files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file: Any = files.open_hdf5(self.path)
        except OSError as problem:
            raise ConfigError(f"data.files: cannot read {path}: {problem.strerror}") from None
        attributes = self._attributes()
        if attributes.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"data.files: {path} is of format {attributes.format_version}; this version reads {FORMAT_VERSION}"
            )
        self.tokens, self.documents = self._dataset("tokens"), self._dataset("documents")
        self.vocabulary, self.name = attributes.vocabulary, attributes.tokenizer
        self.sources = attributes.sources
        self._chunk = lru_cache(_KEPT)(self._read)
        self._require_documents()

    def _attributes(self) -> _Attributes:
        """Return the attributes; the datasets tell a store from other HDF5 files."""
        try:
            found = {name: _plain(value) for name, value in self._file.attrs.items()}
            is_store = {"tokens", "documents"} <= set(self._file) and "vocabulary" in found
        except Exception as problem:  # damaged metadata: h5py raises errors of several kinds
            raise self._damaged(problem) from None
        if not is_store:
            raise ConfigError(f"data.files: {self.path} is no token store: make one with colossal-mpi data prepare")
        try:
            attributes = _Attributes.model_validate(found)
        except ValidationError as problem:
            first = problem.errors()[0]
            raise self._damaged(f"{first['loc'][0]}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
        if attributes.crc32 not in (None, _checksum(attributes.tokenizer, attributes.sources)):
            raise self._damaged("the checksum of tokenizer and sources differs")
        return attributes

    def _damaged(self, reason: object) -> ConfigError:
        return ConfigError(f"data.files: {self.path} is damaged: {str(reason).splitlines()[0]}")

    def _dataset(self, name: str) -> Any:
        """Return a dataset of integers in one dim that lies in this file itself."""
        try:
            found = files.find_dataset(self._file, name)
        except (KeyError, ValueError) as problem:
            reason = problem if isinstance(problem, ValueError) else f"{name} is no dataset"
            raise self._damaged(reason) from None
        except Exception as problem:  # damaged metadata
            raise self._damaged(problem) from None
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise self._damaged(f"{name} must hold integers in one dim")
        return found

    def _require_documents(self) -> None:
        """Refuse documents that do not lie in the tokens, one after the other."""
        last = 0
        for start in range(0, len(self.documents), _BUFFER):
            ends = self._values(self.documents, start, start + _BUFFER).astype(np.int64)
            if ends[0] < last or (np.diff(ends) < 0).any():
                raise self._damaged("the ends of its documents do not ascend")
            last = int(ends[-1])
        if last > len(self):
            raise self._damaged(f"its documents end at {last}, and it has {len(self)} tokens")

    def _values(self, dataset: Any, start: int, stop: int) -> np.ndarray:
        try:
            values: np.ndarray = dataset[start:stop]
        except Exception as problem:  # HDF5's checksums, or damaged metadata
            name = dataset.name.strip("/")
            raise ConfigError(f"data.files: {self.path} is damaged in the {name} from {start} on: {problem}") from None
        return values

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens; an error if the store was made for a smaller vocabulary."""
        text = b""
        if self._file.get("tokenizer", getlink=True) is not None:
            definition = self._dataset("tokenizer")
            if definition.size > files.LARGEST_TEXT:
                raise self._damaged(f"its tokenizer has {definition.size:,} bytes")
            text = bytes(self._values(definition, 0, definition.size))
        try:
            found = from_text(self.name, text.decode())
        except UnicodeDecodeError as problem:
            raise self._damaged(f"its tokenizer is no text: {problem}") from None
        if found.vocabulary > self.vocabulary:
            raise ConfigError(
                f"data.files: {self.path} was made for a vocabulary of {self.vocabulary}, and the ids of its tokenizer "
                f"go to {found.vocabulary - 1}: make the store again with colossal-mpi data prepare --overwrite"
            )
        return found

    @property
    def has_checksums(self) -> bool:
        """False for a store of another program, or of a version that gave the tokenizer no checksum."""
        datasets = [self.tokens, self.documents]
        if self._file.get("tokenizer", getlink=True) is not None:
            datasets.append(self._dataset("tokenizer"))
        return "crc32" in self._file.attrs and all(one.fletcher32 or not one.size for one in datasets)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of a token."""
        dtype: np.dtype = self.tokens.dtype
        return dtype

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def _read(self, number: int) -> np.ndarray:
        chunk = self._values(self.tokens, number * CHUNK, (number + 1) * CHUNK)
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

    def ends(self) -> np.ndarray:
        """Return the places in the tokens where the documents end."""
        return self._values(self.documents, 0, len(self.documents))

    def document(self, number: int, most: int) -> np.ndarray:
        """Return the first tokens of a document, at most `most`."""
        before = max(0, number - 1)
        ends = [int(end) for end in self._values(self.documents, before, number + 1)]
        start = ends[0] if number else 0
        tokens = self._values(self.tokens, start, min(ends[-1], start + most))
        _require_ids(tokens, self.vocabulary, f"data.files: {self.path} holds the token")
        return tokens


def _plain(value: Any) -> Any:
    """Return an attribute as numbers and texts of Python."""
    found = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return found.decode(errors="replace") if isinstance(found, bytes) else found
