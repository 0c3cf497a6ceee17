"""Checksums of parts of files: a damaged one names the dataset that it is in, and many ranks share the reading.

The parts of a file cover every byte of it. Those of a dataset are at most `LARGEST` bytes; what lies between datasets
is HDF5's own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from colossal_mpi.errors import CheckpointError

LARGEST = 1 << 26
"""Bytes of a part."""
_PIECE = 1 << 20  # bytes that are read at once: what was just read is hashed from the processor's cache


@dataclass(frozen=True)
class Part:
    """Bytes of a file, their SHA-256, and the dataset that they belong to, ``""`` for HDF5's own."""

    file: str
    offset: int
    bytes: int
    sha256: str
    name: str = ""


def cover(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield offsets and sizes of the parts of some bytes."""
    for start in range(offset, offset + size, LARGEST):
        yield start, min(LARGEST, offset + size - start)


def digest(buffer: Any) -> str:
    """Return the SHA-256 of a buffer."""
    return hashlib.sha256(buffer).hexdigest()


def digest_of(descriptor: int, offset: int, size: int) -> str | None:
    """Return the SHA-256 of bytes of an open file, None if it ends before."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(_PIECE, size)))
    while size:
        got = os.preadv(descriptor, [buffer[: min(_PIECE, size)]], offset)
        if not got:
            return None
        found.update(buffer[:got])
        offset, size = offset + got, size - got
    return found.hexdigest()


def whole(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file that is HDF5's own: its index."""
    size = path.stat().st_size
    with path.open("rb") as file:
        found = digest_of(file.fileno(), 0, size)
    return {"bytes": size, "parts": [[0, size, found, ""]]}


def table(files: dict[str, Any]) -> list[Part]:
    """Return the parts of all files of a manifest, in order."""
    return [Part(name, *part) for name in sorted(files) for part in files[name]["parts"]]


def share(parts: Sequence[Part], rank: int, size: int) -> list[Part]:
    """Return the parts that one of `size` ranks reads: as many bytes as the others, from as few files as may be."""
    total, before, mine = sum(part.bytes for part in parts), 0, []
    for part in parts:
        middle = before + part.bytes / 2
        if rank == min(size - 1, int(middle * size / max(1, total))):
            mine.append(part)
        before += part.bytes
    return mine


def damage(directory: Path, files: dict[str, Any], parts: Iterable[Part]) -> Iterator[str]:
    """Yield what is wrong with some parts, in a line each; a file that is missing or of another size comes once."""
    opened, path, known = -1, "", False
    try:
        for part in parts:
            if part.file != path:
                if opened >= 0:
                    os.close(opened)
                opened, path = -1, part.file
                problem = _unlike(directory, path, files)
                known = problem is not None
                if problem is not None:
                    yield problem
                    continue
                opened = os.open(directory / path, os.O_RDONLY)
            if not known and digest_of(opened, part.offset, part.bytes) != part.sha256:
                where = f"in {part.name}" if part.name else "in what describes its datasets"
                yield (
                    f"{directory} is damaged: {path} is not the file that was written, {where} (SHA-256 of bytes "
                    f"{part.offset} to {part.offset + part.bytes} differs)"
                )
    finally:
        if opened >= 0:
            os.close(opened)


def _unlike(directory: Path, name: str, files: dict[str, Any]) -> str | None:
    """Say what is wrong with the size of a file, if it is."""
    path, expected = directory / name, files[name]["bytes"]
    if not path.is_file():
        return f"{directory} is damaged: {name} is missing{_holding(files[name], 0)}"
    size = path.stat().st_size
    if size < expected:
        return f"{directory} is damaged: {name} has {size} of its {expected} bytes{_holding(files[name], size)}"
    if size > expected:
        return f"{directory} is damaged: {name} has {size} bytes and was written with {expected}"
    return None


_NAMED = 4


def _holding(file: dict[str, Any], size: int) -> str:
    """Name the datasets that end behind the first `size` bytes of a file."""
    lost = list(dict.fromkeys(name for start, n, _, name in file["parts"] if name and start + n > size))
    more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    return f", with {', '.join(lost[:_NAMED])}{more}" if lost else ""


def require(directory: Path, files: dict[str, Any], parts: Iterable[Part]) -> None:
    """Refuse parts that are damaged.

    Raises
    ------
    CheckpointError
        Of the first few.
    """
    problems = list(islice(damage(directory, files, parts), _NAMED))
    if problems:
        raise CheckpointError("; ".join(problems))
