"""The texts of files: plain or compressed, a document in a file or in each line of JSON, in pieces of limited size.

``corpus`` and ``prepare`` call `pieces`, after ``formats`` told what the files are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from colossal_mpi.apps.data.formats import LINES, Format, open_text, reading
from colossal_mpi.errors import ConfigError

PIECE = 1 << 20
"""Bytes of text that are read together."""

Piece = tuple[bytes, bool, int]
"""Some text, whether a document ends after it, and the number of bytes of the file that it took."""


def pieces(path: Path, kind: Format, key: str = "text") -> Iterator[Piece]:
    """Yield the text of a file in pieces.

    Parameters
    ----------
    path : Path
        The file.
    kind : Format
        Whether it is one text or JSON lines.
    key : str
        The key of the text in a line of JSON.

    Yields
    ------
    Piece
        Some text. A piece of a document that goes on ends at a line or a blank if there is one.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a line of JSON is no object with a text under the key.
    """
    with reading(path), open_text(path) as file:
        yield from _lines(path, file, key) if kind.name == LINES else _document(file)


def _document(file: BinaryIO) -> Iterator[Piece]:
    rest = b""
    while read := file.read(PIECE):
        text = rest + read
        cut = _cut(text) if len(text) >= PIECE else 0
        yield text[:cut], False, len(read)
        rest = text[cut:]
    yield rest, True, 0


_BORDER = re.compile(rb"(?<=\S)\n(?=\S)")


def _cut(text: bytes) -> int:
    """Return where to cut a piece: at a line in its second half with no blank beside it, so that words stay whole."""
    half = len(text) // 2
    borders = [match.end() for match in _BORDER.finditer(text, half)]
    blank = text.rfind(b" ", half)
    return borders[-1] if borders else blank if blank > 0 else _whole_characters(text)


def _whole_characters(text: bytes) -> int:
    """Return the end of the last complete character of UTF-8."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:
            need = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(text) if need <= back else len(text) - back
    return len(text)


def _lines(path: Path, file: BinaryIO, key: str) -> Iterator[Piece]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            text = json.loads(line)[key]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise ConfigError(
                f"{path}, line {number}: it must be a JSON object with a text {key!r}; see --key of data prepare"
            )
        yield text.encode("utf-8", errors="replace"), True, len(line)
