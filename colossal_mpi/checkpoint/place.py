"""Directories and names of checkpoints, and how they reach the disk."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from colossal_mpi.errors import CheckpointError

MANIFEST, INDEX, LATEST = "manifest.json", "index.h5", "latest"


def rank_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank{rank:05d}.h5"


def partial_name(directory: Path) -> Path:
    """Return where a checkpoint is while it is being written: hidden, beside its final place."""
    return directory.with_name(f".{directory.name}.partial")


def make(directory: Path) -> None:
    """Make the directory in which a checkpoint is written.

    Raises
    ------
    CheckpointError
        If the checkpoint exists.
    """
    if directory.exists():
        raise CheckpointError(
            f"{directory} exists: a checkpoint is never overwritten; choose another name or remove it"
        )
    partial = partial_name(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def settle(directory: Path) -> None:
    """Give a checkpoint that is written its final name."""
    flush(partial_name(directory))
    partial_name(directory).rename(directory)
    flush(directory.parent)


def discard(directory: Path) -> None:
    """Remove what was written of a checkpoint that failed."""
    shutil.rmtree(partial_name(directory), ignore_errors=True)


def remove(directory: Path) -> None:
    """Remove a checkpoint; one that is half removed never has its name."""
    hidden = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden)


def unwritable(path: Path, problem: Exception, need: int | None = None) -> CheckpointError:
    """Return the error of a file that could not be written, with what the system said: HDF5 wraps it in its own words.

    Of HDF5 it is an OSError or, when a file is closed, a RuntimeError.
    """
    said = re.search(r"error message = '([^']*)'", str(problem))
    reason = said.group(1) if said else getattr(problem, "strerror", None) or str(problem)
    needed = "" if need is None else f"it needs {need:,} bytes, and "
    return CheckpointError(f"{path} cannot be written: {reason}; {needed}{_free(path)} bytes are free")


def _free(path: Path) -> str:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return "no"
    return f"{disk.f_bavail * disk.f_frsize:,}"


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_latest(directory: str | Path) -> None:
    """Make the link ``latest`` beside a checkpoint point to it, in one step. Call it on one rank."""
    directory = Path(directory)
    link = directory.parent / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(directory.name)
    os.replace(link, directory.parent / LATEST)
    flush(directory.parent)
