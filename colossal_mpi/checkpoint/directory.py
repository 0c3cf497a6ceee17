"""Names of a checkpoint's files, and the steps that create, publish and remove its directory.

`colossal_mpi.checkpoint.saving` creates, publishes and discards directories; the run directories of ``apps`` call
`point_latest` and `remove`. The module calls only the operating system.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from colossal_mpi.errors import CheckpointError

MANIFEST, INDEX, LATEST = "manifest.json", "index.h5", "latest"
_WITHOUT_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""The errors of a file system that has no symlinks."""


def rank_file_name(rank: int) -> str:
    """Return the name of the file that a rank writes."""
    return f"rank{rank:05d}.h5"


def partial_directory(directory: Path) -> Path:
    """Return the hidden directory, beside the final one, in which a checkpoint is written."""
    return directory.with_name(f".{directory.name}.partial")


def create(directory: Path) -> None:
    """Create the hidden directory in which a checkpoint is written.

    Raises
    ------
    CheckpointError
        If the final directory exists.
    """
    if directory.exists():
        raise CheckpointError(
            f"{directory} exists: a checkpoint is never overwritten; choose another name or remove it"
        )
    partial = partial_directory(directory)
    try:
        if partial.is_symlink():
            partial.unlink()
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as problem:
        raise write_error(directory, problem) from None


def publish(directory: Path) -> None:
    """Flush a complete checkpoint to the disk and give it its final name."""
    flush(partial_directory(directory))
    partial_directory(directory).rename(directory)
    flush(directory.parent)


def discard(directory: Path) -> None:
    """Remove the hidden directory of a checkpoint that failed."""
    shutil.rmtree(partial_directory(directory), ignore_errors=True)


def remove(directory: str | Path) -> None:
    """Remove a checkpoint; call it on one rank.

    The directory is hidden first, so that no half removed checkpoint ever has a visible name.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint.
    """
    directory = Path(directory)
    hidden = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    directory.rename(hidden)
    shutil.rmtree(hidden)


def write_error(path: Path, problem: Exception, need: int | None = None) -> CheckpointError:
    """Return the error for a file that could not be written, with the reason that the system gave.

    Parameters
    ----------
    path : Path
        The file or directory.
    problem : Exception
        The exception: an OSError or, when HDF5 closes a file, a RuntimeError. HDF5 wraps the system's reason in a
        longer message.
    need : int, optional
        Bytes that the file needs.
    """
    reported = re.search(r"error message = '([^']*)'", str(problem))
    reason = reported.group(1) if reported else getattr(problem, "strerror", None) or str(problem)
    needed = "" if need is None else f"it needs {need:,} bytes, and "
    return CheckpointError(f"{path} cannot be written: {reason}; {needed}{_free_bytes(path)} bytes are free")


def _free_bytes(path: Path) -> str:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return "no"
    return f"{disk.f_bavail * disk.f_frsize:,}"


def flush(path: str | Path) -> None:
    """Force a file, or the names in a directory, to the disk (``fsync``).

    Parameters
    ----------
    path : str or Path
        An existing file or directory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def point_latest(directory: str | Path) -> None:
    """Make the symlink ``latest`` beside a checkpoint point to it, in one atomic step; call it on one rank.

    A directory ``latest``, which a copy of a run has where the link was, is removed first. On a file system without
    symlinks ``latest`` is a file with the name of the checkpoint.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint.
    """
    directory = Path(directory)
    latest, link = directory.parent / LATEST, directory.parent / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(directory.name)
    except OSError as problem:
        if problem.errno not in _WITHOUT_LINKS:
            raise
        link.write_text(f"{directory.name}\n", encoding="utf-8")
    if latest.is_dir() and not latest.is_symlink():
        remove(latest)
    os.replace(link, latest)
    flush(directory.parent)
