"""The directories that the parent and its ranks share."""

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest


class Store:
    """Prepared reference files and the shared directories of tests.

    Parameters
    ----------
    prepared : Path
        Where ``prepare`` functions write, one directory each.
    shared : Path
        Where tests write, one directory each.
    writes : bool
        Whether this process runs the ``prepare`` functions; ranks only read.
    """

    def __init__(self, prepared: Path, shared: Path, *, writes: bool):
        self.prepared, self._shared, self._writes = prepared, shared, writes
        self._ran: dict[str, tuple[Callable, BaseException | None]] = {}

    def prepare(self, item: pytest.Item) -> Path | None:
        """Return the directory that the item's ``prepare`` function fills, filled.

        Raises
        ------
        BaseException
            Whatever the function raised, each time it is asked for again.
        """
        marker = item.get_closest_marker("prepare")
        if marker is None:
            return None
        func = marker.args[0]
        name = re.sub(r"[^\w.]", "_", f"{func.__module__}.{func.__qualname__}")
        if self._writes:
            self._run(func, name)
        return self.prepared / name

    def _run(self, func: Callable, name: str) -> None:
        if name not in self._ran:
            (self.prepared / name).mkdir(parents=True)
            self._ran[name] = func, _error_of(func, self.prepared / name)
        first, error = self._ran[name]
        if first is not func:
            raise pytest.UsageError(f"two functions of @pytest.mark.prepare are named {name}: rename one")
        if error is not None:
            raise error

    def shared(self, item: pytest.Item) -> Path:
        """Return the item's directory, under a name that every rank computes alike."""
        name = re.sub(r"\W+", "_", item.name)[:40]
        path = self._shared / f"{name}-{zlib.crc32(item.nodeid.encode()):08x}"
        path.mkdir(parents=True, exist_ok=True)
        return path


STORE = pytest.StashKey[Store]()


def _error_of(func: Callable, path: Path) -> BaseException | None:
    try:
        func(path)
    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
        return error
    return None
