"""The format of a data file: told by its first bytes, and by its name where the bytes do not tell.

``corpus`` calls `recognize` for each file of a run and ``prepare`` for each of its inputs; ``texts`` opens what is
text. A file that is binary and not known is refused, so that no tokens or archives are taken for the bytes of a text.

=================================  =====================================================================================
file                               told by
=================================  =====================================================================================
token store, ``.npy``              the signature at its beginning
llm.c                              the header of 256 int32: 20240520 (uint16) or 20240801 (uint32), version, tokens
Megatron (``.bin`` and ``.idx``)   the signature of the ``.idx`` of the same name, which has the dtype
nanoGPT, other tokens              ``data.dtype``: such a file has no header
text                               UTF-8 without NUL; compressed by gzip, bzip2, xz or zstd
JSON lines                         the suffix ``.jsonl`` or ``.ndjson`` in any case, or ``.json`` with an object a line
=================================  =====================================================================================
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import os
import select
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from colossal_mpi.errors import ConfigError
from colossal_mpi.files import open_regular

TEXT, LINES, STORE, ARRAY, BINARY = "text", "jsonl", "store", "npy", "binary"
"""The formats: text, JSON lines, token store, NumPy file, and token ids behind a header or without one."""
FORMATS = ("auto", TEXT, LINES)
"""What a user may say of files."""

_HEAD = 1 << 16
"""Bytes at the beginning of a file that tell its format."""
_LINES = (".jsonl", ".ndjson")
_BINARY = ".bin"
_TEXTS = (".txt", ".md", ".json", *_LINES, ".gz", ".bz2", ".xz", ".zst")
"""Names of texts and of packed files, which are no tokens without a header."""
_STORE, _ARRAY = b"\x89HDF\r\n\x1a\n", b"\x93NUMPY"
_NAMED = {".h5": STORE, ".npy": ARRAY}
_LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""The first number of a file of llm.c, its version, and the dtype of its tokens."""
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_ARCHIVE = "unpack it; save tokens with numpy.save, texts as .txt or .jsonl"
_TABLE = "write its texts as .jsonl, one JSON object with a text in each line"
REFUSED = {
    b"PK\x03\x04": (".npz or another zip archive", _ARCHIVE),
    b"PK\x05\x06": (".npz or another zip archive", _ARCHIVE),
    _MEGATRON: ("the index of a Megatron data set", "name the .bin beside it"),
    _STORE: ("a packed token store", _ARCHIVE),
    _ARRAY: ("a packed .npy", _ARCHIVE),
    b"PAR1": ("a Parquet file", _TABLE),
    b"ARROW1": ("an Arrow file", _TABLE),
    b"\xff\xfe": ("text in UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "convert it with iconv -f UTF-16 -t UTF-8"),
}
"""Beginnings of files that are known and not read, what such a file is, and what would work."""
_UNPACKED, _PACKED = 1 << 28, 250
"""Bytes to which any compressed text may unpack, and how many times its own size a larger one may have."""
_PATIENCE = 60
"""Seconds that a named pipe may be silent at first."""
_ZSTD = ("compression.zstd", "zstandard")
"""Modules that unpack zstd: of Python from 3.14 on, and a package."""
_AS_TEXT = 'data.format = "text" (--format text of data prepare) takes its bytes as they are'


@dataclass(frozen=True)
class Format:
    """The format in which a file holds text or tokens.

    Parameters
    ----------
    name : str
        One of ``text``, ``jsonl``, ``store``, ``npy`` and ``binary``.
    dtype : str
        For ``binary``, the NumPy dtype of a token.
    offset : int
        For ``binary``, the number of bytes before the first token.
    """

    name: str
    dtype: str = ""
    offset: int = 0

    @property
    def is_text(self) -> bool:
        """True if the file holds text and not tokens."""
        return self.name in (TEXT, LINES)


def recognize(path: Path, choice: str = "auto", dtype: str = "") -> Format:
    """Return the format of a file.

    Parameters
    ----------
    path : Path
        The file. A pipe is not read: its name tells its format.
    choice : str
        ``text`` or ``jsonl`` where a file that is no token store and no NumPy file is to be taken as such; ``auto``.
    dtype : str
        The dtype of the tokens of files without a header; ``""`` if they are texts.

    Returns
    -------
    Format
        The format.

    Raises
    ------
    ConfigError
        If the file cannot be read or is damaged, or is in no format that is known.
    """
    with reading(path):
        if path.is_fifo() and path.suffix.lower() not in (*_NAMED, _BINARY):
            return _by_name(path, choice)
        with open_regular(path) as file:
            head = file.read(_HEAD)
        known = STORE if head.startswith(_STORE) else ARRAY if head.startswith(_ARRAY) else None
        if known or path.suffix.lower() in _NAMED:
            return Format(known or _NAMED[path.suffix.lower()])
        if choice != "auto":
            return Format(choice)
        return _tokens(path, head, dtype) or _text(path)


def is_store(path: Path) -> bool:
    """Say whether a file is a token store, by its signature or its name; nothing is raised.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    bool
        False also for a file of another name that cannot be read.
    """
    if path.suffix.lower() == ".h5":
        return True
    try:
        with open_regular(path) as file:
            return file.read(len(_STORE)) == _STORE
    except OSError:
        return False


def _by_name(path: Path, choice: str) -> Format:
    """Return the format of what cannot be read twice."""
    return Format(choice if choice != "auto" else LINES if path.suffix.lower() in _LINES else TEXT)


def _tokens(path: Path, head: bytes, dtype: str) -> Format | None:
    """Return the format of a file of tokens, None for another file."""
    size, index = path.stat().st_size, path.with_suffix(".idx")
    if path.suffix.lower() == _BINARY and index.is_file() and (found := _megatron(index)):
        _require_size(path, size, 0, found, index.name)
        return Format(BINARY, found)
    magic, version, count = struct.unpack("<3i", head[:12]) if len(head) >= 1024 else (0, 0, 0)
    if magic in _LLMC and _LLMC[magic][0] == version:
        found = _LLMC[magic][1]
        if dtype and np.dtype(dtype) != np.dtype(found):
            raise ConfigError(f"{path} holds {np.dtype(found)} by its header, and data.dtype={dtype}: leave it out")
        _require_size(path, size, 1024, found, "its header", count)
        return Format(BINARY, found, 1024)
    if not dtype:
        return None
    if path.suffix.lower() in _TEXTS:
        raise ConfigError(f"{path} is no file of tokens by its name, for which data.dtype={dtype} is: leave it out")
    little = np.dtype(dtype).newbyteorder("<").str
    _require_size(path, size, 0, little, "data.dtype")
    return Format(BINARY, little)


def _megatron(index: Path) -> str | None:
    """Return the dtype that the index of a Megatron data set gives, None if it is no such index."""
    with open_regular(index) as file:
        head = file.read(18)
    if not head.startswith(_MEGATRON) or len(head) < 18:
        return None
    code = head[17]
    if code not in _MEGATRON_DTYPES:
        raise ConfigError(f"{index} has the dtype code {code}: tokens are integers, codes {sorted(_MEGATRON_DTYPES)}")
    return _MEGATRON_DTYPES[code]


def megatron_ends(path: Path) -> np.ndarray | None:
    """Return where the documents of a Megatron data set end.

    Parameters
    ----------
    path : Path
        The file of tokens.

    Returns
    -------
    array of int64 or None
        The place after the last token of each document; None if the file has no index of Megatron.

    Raises
    ------
    ConfigError
        If the index is shorter than it says, or names documents that it has not.

    Notes
    -----
    The index has, after the dtype, the number of sequences, the number n of document bounds, the length of each
    sequence in int32, its place in int64, and for each document the number of its first sequence, with the number of
    all sequences at the end.
    """
    index = path.with_suffix(".idx")
    if path.suffix.lower() != _BINARY or not index.is_file():
        return None
    with reading(index), open_regular(index) as file:
        head = file.read(34)
        if not head.startswith(_MEGATRON):
            return None
        sequences, bounds = struct.unpack("<QQ", head[18:34]) if len(head) == 34 else (0, 0)
        size = index.stat().st_size
        if len(head) < 34 or size < 34 + 12 * sequences + 8 * bounds:
            raise ConfigError(f"{index} has {size} bytes, less than its {sequences} sequences and {bounds} bounds take")
        lengths = np.fromfile(file, "<i4", sequences)
        file.seek(8 * sequences, io.SEEK_CUR)
        numbers = np.fromfile(file, "<i8", bounds)
    if (lengths < 0).any() or (numbers < 0).any() or (numbers > sequences).any():
        raise ConfigError(f"{index} is damaged: it names sequences that it has not, or of negative length")
    places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ends: np.ndarray = places[np.sort(numbers)]
    return ends


def _require_size(path: Path, size: int, offset: int, dtype: str, source: str, count: int | None = None) -> None:
    width = np.dtype(dtype).itemsize
    tokens, rest = divmod(size - offset, width)
    if rest or count not in (None, tokens):
        needed = f"{count} tokens" if count is not None else "whole tokens"
        raise ConfigError(
            f"{path} has {size} bytes, and {source} asks for {needed} of {np.dtype(dtype).name} after {offset} bytes: "
            "it is damaged or of another dtype"
        )


def _text(path: Path) -> Format:
    """Return the format of a text, which may be compressed."""
    with open_text(path) as file:
        head = file.read(_HEAD)
    inner = Path(path.stem if _compression(path) else path.name).suffix.lower()
    found = next((known for magic, known in REFUSED.items() if head.startswith(magic)), None)
    if found:
        raise ConfigError(f"{path} is {found[0]}: {found[1]}")
    if inner == _BINARY:
        raise ConfigError(
            f"{path} has no header of llm.c and no index of Megatron: give the dtype of its tokens, "
            f'data.dtype="uint16" for files of nanoGPT; {_AS_TEXT}'
        )
    _require_utf8(path, head)
    if inner == ".json" and not _begins_with_object(head):
        raise ConfigError(
            f"{path} is not one JSON object in each line: write it so (jq -c '.[]' FILE.json > FILE.jsonl); {_AS_TEXT}"
        )
    return Format(LINES if inner == ".json" or inner in _LINES else TEXT)


def _require_utf8(path: Path, head: bytes) -> None:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD)
        place = head.find(0)
    except UnicodeDecodeError as problem:
        place = problem.start
    if place >= 0:
        raise ConfigError(
            f"{path} is in no format that is known, and no text in UTF-8 (byte {head[place]:#04x} at {place}): convert "
            f"it with iconv -t UTF-8, or give data.dtype if it holds tokens without a header; {_AS_TEXT}"
        )


def _begins_with_object(head: bytes) -> bool:
    """Say whether the first line of JSON is an object; a line that is longer than `head` may be one."""
    line, end, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not end and len(head) == _HEAD:
        return line.startswith(b"{")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def open_text(path: Path) -> BinaryIO:
    """Open a text for reading, and unpack it if it is compressed.

    Parameters
    ----------
    path : Path
        The file; a pipe is taken as it is.

    Returns
    -------
    binary file
        The bytes of the text.

    Raises
    ------
    ConfigError
        If it is compressed by zstd and no package for that is installed.
    OSError
        If it cannot be read.
    """
    if path.is_fifo():
        return _open_pipe(path)
    opener = _compression(path)
    if opener is None:
        return open_regular(path)
    most = max(_UNPACKED, _PACKED * path.stat().st_size)
    return cast(BinaryIO, io.BufferedReader(_Unpacked(path, opener(path), most)))


def _open_pipe(path: Path) -> BinaryIO:
    """Open a pipe, to which a program must have begun to write within `_PATIENCE` seconds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not path.is_relative_to("/dev") and not select.select([descriptor], [], [], _PATIENCE)[0]:
        os.close(descriptor)
        raise ConfigError(f"cannot read {path}: it is a pipe, and no program wrote to it for {_PATIENCE} s")
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


class _Unpacked(io.RawIOBase):
    """The contents of a compressed file, up to a limit."""

    def __init__(self, path: Path, file: BinaryIO, most: int) -> None:
        self._path, self._file, self._most, self._left = path, file, most, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._file.read(len(buffer))
        self._left -= len(found)
        if self._left < 0:
            raise ConfigError(
                f"{self._path} unpacks to more than {self._most:,} bytes, {_PACKED} times its size: unpack it first if "
                "that is right"
            )
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def _compression(path: Path) -> Callable[[Path], BinaryIO] | None:
    if not path.is_file():
        return None
    with open_regular(path) as file:
        head = file.read(6)
    return next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)


def _open_zstd(path: Path) -> BinaryIO:
    for name in _ZSTD:
        try:
            package = importlib.import_module(name)
        except ImportError:
            continue
        if name == "compression.zstd":
            return cast(BinaryIO, package.open(path))
        # Programs that compress in parallel write several frames.
        frames = package.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(frames)
    raise ConfigError(f"{path} is compressed by zstd, which needs a package: pip install zstandard, or unpack it")


_COMPRESSED: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": lambda path: cast(BinaryIO, gzip.open(path)),  # noqa: SIM115
    b"BZh": lambda path: cast(BinaryIO, bz2.open(path)),  # noqa: SIM115
    b"\xfd7zXZ\x00": lambda path: cast(BinaryIO, lzma.open(path)),  # noqa: SIM115
    b"\x28\xb5\x2f\xfd": _open_zstd,
}
"""The first bytes of compressed files, and what opens them."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make each failure to read or unpack a file a `ConfigError` that names it.

    Parameters
    ----------
    path : Path
        The file that is read inside the context.

    Yields
    ------
    None
        The context.

    Raises
    ------
    ConfigError
        If the file cannot be read, or its compressed bytes are damaged.
    """
    try:
        yield
    except _failures() as problem:
        why = getattr(problem, "strerror", None) or problem
        raise ConfigError(f"cannot read {path}: {why}") from None


def _failures() -> tuple[type[Exception], ...]:
    zstd = [module.ZstdError for module in map(sys.modules.get, _ZSTD) if module is not None]
    return OSError, EOFError, zlib.error, lzma.LZMAError, *zstd
