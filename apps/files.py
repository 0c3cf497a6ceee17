"""The files that commands and runs write: checked before the work begins, and made new and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from colossal_mpi import files
from colossal_mpi.errors import ConfigError


def check_writable(path: Path | None) -> None:
    """Create the folder of a result file and open the file, so that a long command fails at once if it cannot write.

    Parameters
    ----------
    path : Path or None
        The file; None means that nothing is to be written.

    Raises
    ------
    ConfigError
        If the file or its folder cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():
            os.close(files.open_to_append(path.resolve()))
        else:
            with path.open("a"):
                pass
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make each failure to write a file a `ConfigError` that names it.

    Parameters
    ----------
    path : Path
        The file that is written inside the context.

    Yields
    ------
    None
        The context.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    try:
        yield
    except (OSError, ValueError) as problem:  # a name may have a zero byte
        raise ConfigError(f"{path} cannot be written: {getattr(problem, 'strerror', None) or problem}") from None


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file of a run or a report, by `files.write_new`: links are replaced, a full disk leaves the old file.

    Parameters
    ----------
    path : Path
        The file.
    content : str or bytes
        The contents.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    with writing(path):
        files.write_new(path, content)


def write_result(path: Path, text: str) -> None:
    """Write a file that a user names for results, which may be a device or a pipe such as ``/dev/stdout``.

    Parameters
    ----------
    path : Path
        The file.
    text : str
        The contents.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    if path.is_file() or not path.exists():
        write_output(path.resolve(), text)
        return
    with writing(path):
        path.write_text(text, encoding="utf-8")
