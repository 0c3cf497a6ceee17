"""Tokenizers: bytes, or a file of the package tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from colossal_mpi.errors import ConfigError

BYTES = "bytes"


class Tokenizer(Protocol):
    """What turns text to tokens and back."""

    name: str
    vocabulary: int
    text: str
    """Its definition as JSON, ``""`` where the name says all."""

    def encode(self, pieces: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
        """Return the tokens of each piece of UTF-8, with those that belong around a text if `special`."""

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the text of tokens."""


class Bytes:
    """A token for each byte."""

    name, vocabulary, text = BYTES, 256, ""

    def encode(self, pieces: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
        """Return the bytes themselves."""
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the tokens that are bytes."""
        return bytes(int(token) for token in tokens if 0 <= token < self.vocabulary)


class Subwords:
    """A tokenizer of the package tokenizers.

    Parameters
    ----------
    text : str
        The JSON of its file.
    name : str

    Raises
    ------
    ConfigError
        If the package is missing or the text is no tokenizer.
    """

    def __init__(self, text: str, name: str) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ConfigError(
                f"the tokenizer {name} needs the package tokenizers: pip install colossal-mpi[tokens], or use bytes"
            ) from None
        try:
            self._library: Any = Library.from_str(text)
        except Exception as problem:  # the package raises Exception itself
            raise ConfigError(f"{name} is no file of the package tokenizers: {problem}") from None
        self.text, self.name, self.vocabulary = text, name, int(self._library.get_vocab_size())

    def encode(self, pieces: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
        """Return the tokens of each piece, with those that the tokenizer puts around a text if `special`."""
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        encoded = self._library.encode_batch(texts, add_special_tokens=special)
        return [np.array(one.ids, np.int64) for one in encoded]

    def decode(self, tokens: Iterable[int]) -> bytes:
        """Return the text of tokens."""
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=False).encode()

    def token(self, word: str) -> int | None:
        """Return the number of a special token."""
        return self._library.token_to_id(word)


def tokenizer(name: str) -> Tokenizer:
    """Return ``bytes``, or the tokenizer of a JSON file.

    Raises
    ------
    ConfigError
        If the file cannot be read or is none.
    """
    if name == BYTES:
        return Bytes()
    try:
        text = Path(name).read_text(encoding="utf-8")
        json.loads(text)
    except OSError as problem:
        raise ConfigError(f"tokenizer {name}: {problem.strerror}; give bytes, or a JSON file of tokenizers") from None
    except ValueError:
        raise ConfigError(
            f"tokenizer {name} is no JSON: give bytes, or a JSON file of the package tokenizers"
        ) from None
    return Subwords(text, name)


def restored(name: str, text: str) -> Tokenizer:
    """Return the tokenizer that a store was made with."""
    return Subwords(text, name) if text else Bytes()
