"""Regular files of limited size, and output files that are made new and renamed."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

LARGEST_TEXT = 1 << 28
"""Greatest size in bytes of a file of JSON, a tokenizer for example."""
LARGEST_CONFIG = 1 << 22
"""Greatest size in bytes of a configuration."""
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK  # a pipe without a writer would block


def failure(number: int, reason: str, path: str | Path) -> OSError:
    """Return an OSError whose ``strerror`` is a reason of this package."""
    return OSError(number, reason, str(path))


def open_regular(path: str | Path, within: str | Path | None = None) -> BufferedReader:
    """Open a regular file for reading; never block.

    Parameters
    ----------
    path : str or Path
        The file, or a link to it.
    within : str or Path, optional
        A directory that the file must lie in once links are resolved.

    Returns
    -------
    binary file
        The file, buffered.

    Raises
    ------
    OSError
        If it cannot be opened, is no regular file, or lies outside of `within`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | FLAGS)
    except ValueError:
        raise failure(errno.EINVAL, "its name has a zero byte", path) from None
    try:
        require_regular(descriptor, path)
        if within is not None and not Path(path).resolve().is_relative_to(Path(within).resolve()):
            raise failure(errno.ELOOP, f"it is a link out of {within}", path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(descriptor: int, path: str | Path) -> None:
    """Refuse an open file that is a pipe, a directory, a device or a socket, by an OSError."""
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise failure(number, f"it is {kind} and must be a regular file", path)


def read_bytes(path: str | Path, most: int = LARGEST_TEXT, within: str | Path | None = None) -> bytes:
    """Return the contents of a regular file of limited size.

    Parameters
    ----------
    path : str or Path
        The file.
    most : int
        Greatest size in bytes.
    within : str or Path, optional
        A directory that the file must lie in once links are resolved.

    Returns
    -------
    bytes
        The contents.

    Raises
    ------
    OSError
        If it cannot be read, is no regular file, is larger than `most`, or lies outside of `within`.
    """
    with open_regular(path, within) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= most else b""
        if max(size, len(content)) > most:
            raise failure(errno.EFBIG, f"it has {max(size, len(content)):,} bytes and may have {most:,}", path)
        return content


def write_new(path: str | Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and give it its name in one atomic step.

    Parameters
    ----------
    path : str or Path
        The file. What is there is replaced: a link itself, and not the file that it names.
    content : str or bytes
        The contents; text is written in UTF-8.

    Raises
    ------
    OSError
        If it cannot be written. The former file is then unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | FLAGS, 0o666)
        try:
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the error that led here says more
            partial.unlink(missing_ok=True)
        raise


def _write_all(descriptor: int, content: str | bytes) -> None:
    left = memoryview(content.encode() if isinstance(content, str) else content)
    while left.nbytes:
        left = left[os.write(descriptor, left) :]


def open_to_append(path: str | Path) -> int:
    """Open a regular file to read and append, or create it; never follow a link.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    int
        The file descriptor, which the caller closes.

    Raises
    ------
    OSError
        If it cannot be opened, or is a link or no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | FLAGS
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise failure(errno.ELOOP, "it is a link and must be a regular file", path) from None
        raise
    try:
        require_regular(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def append(path: str | Path, text: str) -> None:
    """Append text to a regular file, or create it; never write through a link.

    Parameters
    ----------
    path : str or Path
        The file.
    text : str
        The text, written in UTF-8.

    Raises
    ------
    OSError
        If it cannot be written, or is a link or no regular file. What part of the text was written is removed.
    """
    descriptor = open_to_append(path)
    try:
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, text)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
