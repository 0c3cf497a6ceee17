"""Plain writing and reading of files, and their cost to this process: bytes from the disk, and memory.

`checkpoint` compares the checkpoints of the library with these plain files.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 26  # bytes to write or read at a time
Block: TypeAlias = "npt.NDArray[np.float32]"


def write(path: Path, blocks: Sequence[Block]) -> None:
    """Write blocks in C order one after the other to a new file, and flush it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for block in blocks:
            flat = block.reshape(-1).view(np.uint8).data
            while flat.nbytes:
                flat = flat[os.write(descriptor, flat[:_CHUNK]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, blocks: Sequence[Block]) -> None:
    """Read a file of `write` into blocks of the same shapes."""
    with path.open("rb", buffering=0) as file:
        for block in blocks:
            flat = block.reshape(-1).view(np.uint8).data
            while flat.nbytes:
                got = file.readinto(flat[:_CHUNK])
                if not got:
                    raise EOFError(f"{path} is too short")
                flat = flat[got:]


def drop_cache(paths: Iterable[Path]) -> None:
    """Drop files that the disk holds from the system's cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_from_disk() -> int:
    """Return the bytes that this process has read from a disk so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def resident() -> int:
    """Return the bytes of memory of this process now, and reset `peak`."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS:")


def peak() -> int:
    """Return the greatest bytes of memory since `resident`, or since the start where the system cannot reset it."""
    return _status("VmHWM:")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
