"""Check the files that a command writes its results to, before the command begins its work."""

from __future__ import annotations

from pathlib import Path

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
        with path.open("a"):
            pass
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror}") from None
