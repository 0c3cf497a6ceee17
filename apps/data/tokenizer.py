"""Tokenizers: bytes, or a JSON file of the package tokenizers.

Token stores are made with them, and ``generate`` turns prompts into tokens and tokens into text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from colossal_mpi import files
from colossal_mpi.errors import ConfigError

BYTES = "bytes"


class Tokenizer:
    """Turns text into tokens and back.

    Attributes
    ----------
    name : str
        Its name or file, for a reader.
    vocabulary : int
        One more than the greatest token id. Ids may have holes, so this can be more than the number of entries.
    text : str
        Its definition as JSON; ``""`` where the name defines it.
    ignored : str
        The settings of its file that are switched off, for a reader; ``""`` where there are none.
    """

    name: str
    vocabulary: int
    text: str
    ignored: str = ""

    def encode(self, pieces: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
        """Return the tokens of some pieces of text.

        Parameters
        ----------
        pieces : sequence of bytes
            Texts in UTF-8.
        special : bool
            Whether to add the tokens that begin and end a text.

        Returns
        -------
        list of array
            The tokens of each piece.
        """
        raise NotImplementedError

    def decode(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """Return the text of some tokens.

        Parameters
        ----------
        tokens : iterable of int
            Token ids.
        special : bool
            Whether to keep special tokens, such as the one that ends a text.

        Returns
        -------
        bytes
            The text in UTF-8.
        """
        raise NotImplementedError


class Bytes(Tokenizer):
    """The tokenizer whose tokens are the bytes of the text."""

    name, vocabulary, text = BYTES, 256, ""

    def encode(self, pieces: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def decode(self, tokens: Iterable[int], special: bool = False) -> bytes:
        return bytes(int(token) for token in tokens if 0 <= token < self.vocabulary)


class Subwords(Tokenizer):
    """A tokenizer of the package tokenizers, whose tokens are parts of words.

    A file that was saved after use may ask for truncation, padding or dropout. They are switched off: every text is
    encoded whole, without tokens that it does not have, and always in the same way.

    Parameters
    ----------
    text : str
        The JSON of its file.
    name : str
        Its file, for a reader.

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
        ids = self._library.get_vocab(with_added_tokens=True).values()
        self.text, self.name, self.vocabulary = text, name, 1 + max(ids, default=-1)
        self.ignored = _switch_off(self._library)

    def encode(self, pieces: Sequence[bytes], special: bool = False) -> list[np.ndarray]:
        texts = [piece.decode("utf-8", errors="replace") for piece in pieces]
        try:
            encoded = self._library.encode_batch(texts, add_special_tokens=special)
        except BaseException as problem:  # the package's panics, of a regular expression for example, are no Exception
            if isinstance(problem, KeyboardInterrupt | SystemExit):
                raise
            raise ConfigError(f"the tokenizer {self.name} fails: {problem}") from None
        return [np.array(one.ids, np.int64) for one in encoded]

    def decode(self, tokens: Iterable[int], special: bool = False) -> bytes:
        text: str = self._library.decode([int(token) for token in tokens], skip_special_tokens=not special)
        return text.encode()

    def token(self, word: str) -> int | None:
        """Return the number of a special token, None if there is no such token."""
        number: int | None = self._library.token_to_id(word)
        return number


def _switch_off(library: Any) -> str:
    """Switch off what makes the tokens of a text fewer, more or random, and return the names of what was on."""
    found = []
    if library.truncation is not None:
        found.append(f"truncation to {library.truncation['max_length']} tokens")
        library.no_truncation()
    if library.padding is not None:
        found.append(f"padding with {library.padding['pad_token']}")
        library.no_padding()
    if getattr(library.model, "dropout", None):
        found.append(f"dropout of {library.model.dropout:g}")
        library.model.dropout = None
    return ", ".join(found)


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that a user names.

    Parameters
    ----------
    name : str
        ``bytes``, or a JSON file of the package tokenizers.

    Returns
    -------
    Tokenizer
        The tokenizer.

    Raises
    ------
    ConfigError
        If the file cannot be read or holds no tokenizer.
    """
    if name == BYTES:
        return Bytes()
    try:
        content = files.read_bytes(name)
        files.parse_json(content)
        text = content.decode()
    except OSError as problem:
        raise ConfigError(f"tokenizer {name}: {problem.strerror}; give bytes, or a JSON file of tokenizers") from None
    except ValueError:
        raise ConfigError(
            f"tokenizer {name} is no JSON: give bytes, or a JSON file of the package tokenizers"
        ) from None
    return Subwords(text, name)


def from_text(name: str, text: str) -> Tokenizer:
    """Return the tokenizer of a definition as JSON; `Bytes` if the definition is empty."""
    return Subwords(text, name) if text else Bytes()
