"""Plain writing and reading of files, whether it reached the disk, and the memory that something takes."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_PIECE = 1 << 26  # bytes


def write(path: Path, blocks: Sequence[np.ndarray]) -> None:
    """Write blocks in C order one after the other to a new file, and bring it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for block in blocks:
            flat = block.reshape(-1).view(np.uint8).data
            while flat.nbytes:
                flat = flat[os.write(descriptor, flat[:_PIECE]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, blocks: Sequence[np.ndarray]) -> None:
    """Read what `write` has written into blocks."""
    with path.open("rb", buffering=0) as file:
        for block in blocks:
            flat = block.reshape(-1).view(np.uint8).data
            while flat.nbytes:
                got = file.readinto(flat[:_PIECE])
                if not got:
                    raise EOFError(f"{path} is too short")
                flat = flat[got:]


def forget(paths: Iterable[Path]) -> None:
    """Drop files, which are on the disk, from the system's cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_from_disk() -> int:
    """Return the bytes that this process has had fetched from a disk so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def resident() -> int:
    """Return the bytes of memory that this process has now, and measure its `peak` from here on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS:")


def peak() -> int:
    """Return the greatest bytes of memory since `resident`; since the start where the system cannot begin anew."""
    return _status("VmHWM:")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
