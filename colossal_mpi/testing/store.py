"""The directories that the parent and its ranks share.

The plugin's fixtures ``prepared`` and ``shared_path`` ask for them, on both sides.
"""

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

Prepare: TypeAlias = Callable[[Path], object]


class Store:
    """Prepared reference files and the shared directories of tests.

    Parameters
    ----------
    prepared : Path
        The directory in which each ``prepare`` function has a directory of its own.
    shared : Path
        The directory in which each test has a directory of its own.
    writes : bool
        Whether this process runs the ``prepare`` functions, as the parent does; ranks only read.
    """

    def __init__(self, prepared: Path, shared: Path, *, writes: bool):
        self.prepared, self._shared, self._writes = prepared, shared, writes
        self._ran: dict[str, tuple[Prepare, BaseException | None]] = {}

    def prepare(self, item: pytest.Item) -> Path | None:
        """Run the item's ``prepare`` function if it has not run yet, and return its directory.

        Raises
        ------
        BaseException
            The exception of the function, for every item that uses it.
        """
        marker = item.get_closest_marker("prepare")
        if marker is None:
            return None
        func = marker.args[0]
        name = re.sub(r"[^\w.]", "_", f"{func.__module__}.{func.__qualname__}")
        if self._writes:
            self._run(func, name)
        return self.prepared / name

    def _run(self, func: Prepare, name: str) -> None:
        if name not in self._ran:
            (self.prepared / name).mkdir(parents=True)
            self._ran[name] = func, _error_of(func, self.prepared / name)
        first, error = self._ran[name]
        if first is not func:
            raise pytest.UsageError(f"two functions of @pytest.mark.prepare are named {name}: rename one")
        if error is not None:
            raise error

    def shared(self, item: pytest.Item) -> Path:
        """Return the directory of an item, under a name that is the same on every rank."""
        name = re.sub(r"\W+", "_", item.name)[:40]
        path = self._shared / f"{name}-{zlib.crc32(item.nodeid.encode()):08x}"
        path.mkdir(parents=True, exist_ok=True)
        return path


STORE = pytest.StashKey[Store]()


def _error_of(func: Prepare, path: Path) -> BaseException | None:
    try:
        func(path)
    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
        return error
    return None
