"""Checksums of parts of files: the one place where the bytes of a checkpoint are verified.

`colossal_mpi.checkpoint.rank_file` makes the checksums while it writes; `load` and `verify` check them with
`find_damage` and `require_undamaged`, and `share` splits the reading among the ranks.

The parts of a file cover all of its bytes. A part belongs to one dataset and has at most `LARGEST` bytes, or it holds
the bytes that HDF5 wrote between datasets. Damage is therefore reported with the dataset that it lies in. A checksum is
written as its algorithm and its value, ``crc32:00c0ffee``. New checksums are CRC-32, which finds every flipped bit and
every burst, and misses other damage once in four thousand million times. They guard against accidents: whoever wants to
change a checkpoint can change its manifest as well. SHA-256 took more than twice as long, and longer than a fast disk
takes to read.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from colossal_mpi import files as disk
from colossal_mpi.checkpoint.manifest import FileRecord
from colossal_mpi.errors import CheckpointError

LARGEST = 1 << 26
"""Greatest size of a part, in bytes."""
_AT_ONCE = 1 << 20  # bytes per read: the processor's cache still holds them when they are hashed


@dataclass(frozen=True)
class Part:
    """A range of bytes of a file, its checksum, and its dataset (``""`` for bytes that HDF5 wrote between datasets)."""

    file: str
    offset: int
    bytes: int
    checksum: str
    dataset: str = ""


def split(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the parts that cover `size` bytes from `offset` on."""
    for start in range(offset, offset + size, LARGEST):
        yield start, min(LARGEST, offset + size - start)


class _Checksum:
    """A checksum that is fed piece by piece."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm, self._crc = algorithm, 0
        self._hash = None if algorithm == "crc32" else hashlib.new(algorithm)

    def update(self, buffer: memoryview | bytes) -> None:
        if self._hash is None:
            self._crc = zlib.crc32(buffer, self._crc)
        else:
            self._hash.update(buffer)

    def text(self) -> str:
        value = f"{self._crc:08x}" if self._hash is None else self._hash.hexdigest()
        return f"{self._algorithm}:{value}"


_ALGORITHMS = ("crc32", "sha256")


def checksum(buffer: memoryview | bytes) -> str:
    """Return the CRC-32 of a buffer."""
    made = _Checksum("crc32")
    made.update(buffer)
    return made.text()


def checksum_of_range(descriptor: int, offset: int, size: int, algorithm: str = "crc32") -> str | None:
    """Return the checksum of a range of bytes of an open file, None if the file ends before it does.

    Parameters
    ----------
    descriptor : int
        The open file.
    offset, size : int
        First byte and number of bytes.
    algorithm : str
        ``"crc32"`` or ``"sha256"``.

    Returns
    -------
    str or None
        The algorithm, a colon and hexadecimal digits.
    """
    made, buffer = _Checksum(algorithm), memoryview(bytearray(min(_AT_ONCE, size)))
    while size:
        got = os.preadv(descriptor, [buffer[: min(_AT_ONCE, size)]], offset)
        if not got:
            return None
        made.update(buffer[:got])
        offset, size = offset + got, size - got
    return made.text()


def _is_intact(descriptor: int, part: Part) -> bool:
    algorithm = part.checksum.partition(":")[0]
    if algorithm not in _ALGORITHMS:
        return False
    return checksum_of_range(descriptor, part.offset, part.bytes, algorithm) == part.checksum


def single_part(path: Path) -> FileRecord:
    """Return the manifest's record of a file that is one part: the index."""
    size = path.stat().st_size
    with disk.open_regular(path) as file:
        made = checksum_of_range(file.fileno(), 0, size)
    return {"bytes": size, "parts": [(0, size, made or "", "")]}


def parts_of(files: Mapping[str, FileRecord]) -> list[Part]:
    """Return the parts of all files of a manifest, ordered by file."""
    return [Part(name, *part) for name in sorted(files) for part in files[name]["parts"]]


def share(parts: Sequence[Part], rank: int, size: int) -> list[Part]:
    """Return the consecutive parts that one of `size` ranks reads, so that all ranks read about as many bytes."""
    total, before, own = sum(part.bytes for part in parts), 0, []
    for part in parts:
        middle = before + part.bytes / 2
        if rank == min(size - 1, int(middle * size / max(1, total))):
            own.append(part)
        before += part.bytes
    return own


def find_damage(directory: Path, files: Mapping[str, FileRecord], parts: Iterable[Part]) -> Iterator[str]:
    """Compare parts with their checksums and yield a line for each that differs.

    A file that is missing, or that has another size than the manifest says, gives one line for all of its parts.
    """
    opened, path, reported = -1, "", False
    try:
        for part in parts:
            if part.file != path:
                if opened >= 0:
                    os.close(opened)
                opened, path = -1, part.file
                problem = _size_problem(directory, path, files)
                reported = problem is not None
                if problem is not None:
                    yield problem
                    continue
                with disk.open_regular(directory / path, within=directory) as file:
                    opened = os.dup(file.fileno())
            if not reported and not _is_intact(opened, part):
                where = f"in {part.dataset}" if part.dataset else "in what describes its datasets"
                yield (
                    f"{directory} is damaged: {path} is not the file that was written, {where} (the checksum "
                    f"of bytes {part.offset} to {part.offset + part.bytes} differs)"
                )
    finally:
        if opened >= 0:
            os.close(opened)


def _size_problem(directory: Path, name: str, files: Mapping[str, FileRecord]) -> str | None:
    """Return a line about the wrong size of a file, None if the size is right."""
    path, expected = directory / name, files[name]["bytes"]
    if path.exists():
        try:
            disk.open_regular(path, within=directory).close()
        except OSError as problem:
            return f"{directory} is damaged: {name} cannot be read: {problem.strerror}"
    else:
        return f"{directory} is damaged: {name} is missing{_lost_datasets(files[name], 0)}"
    size = path.stat().st_size
    if size < expected:
        return f"{directory} is damaged: {name} has {size} of its {expected} bytes{_lost_datasets(files[name], size)}"
    if size > expected:
        return f"{directory} is damaged: {name} has {size} bytes and was written with {expected}"
    return None


_REPORTED = 4


def _lost_datasets(file: FileRecord, size: int) -> str:
    """Return the names of the datasets that do not lie in the first `size` bytes of a file."""
    lost = list(dict.fromkeys(name for start, n, _, name in file["parts"] if name and start + n > size))
    more = f" and {len(lost) - _REPORTED} more" if len(lost) > _REPORTED else ""
    return f", with {', '.join(lost[:_REPORTED])}{more}" if lost else ""


def require_undamaged(directory: Path, files: Mapping[str, FileRecord], parts: Iterable[Part]) -> None:
    """Raise an error if some parts are damaged.

    Raises
    ------
    CheckpointError
        If a part is damaged; the message names the first few.
    """
    problems = list(islice(find_damage(directory, files, parts), _REPORTED))
    if problems:
        raise CheckpointError("; ".join(problems))
