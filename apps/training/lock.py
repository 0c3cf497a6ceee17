"""One job at a time writes a run directory: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from colossal_mpi.errors import ConfigError
from colossal_mpi.runtime.launcher import ALLOCATIONS

_HELD = (errno.EACCES, errno.EAGAIN)


class Lock:
    """The right to write a run directory, until it is released or the process ends, however it ends.

    Parameters
    ----------
    directory : Path
        It must exist. Its file ``lock`` says who has, or had last, the right.

    Raises
    ------
    ConfigError
        If another process has it.

    Notes
    -----
    This is a record lock of POSIX, which NFS and Lustre (mounted with ``flock``) know between hosts, as ``flock`` is
    not everywhere: the system forgets it with its process, and a server with its client. On a file system without
    locks a line on stderr says so, and the right is everybody's. The file stays: one that was removed could be locked
    beside its successor. A process must not open the file a second time, since to close it gives up the lock.

    References
    ----------
    POSIX.1-2017, ``fcntl``: "All locks associated with a file for a given process shall be removed when a file
    descriptor for that file is closed by that process or the process holding that file descriptor terminates."
    """

    def __init__(self, directory: Path) -> None:
        self._file: IO[str] | None = (directory / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            if problem.errno in _HELD:
                holder = _holder(self._file)
                self._file.close()
                raise ConfigError(
                    f"{directory} is being written by {holder}: wait until it ends, or stop it; a new run can go "
                    "elsewhere with --set run.directory=..."
                ) from None
            sys.stderr.write(
                f"colossal_mpi: warning: {directory} is on a file system without locks ({problem.strerror}): see to it "
                "that no other job writes this run\n"
            )
        self._say(_me())

    def release(self) -> None:
        """Give the right up."""
        if self._file is not None:
            with suppress(OSError):  # of a disk that is full: what it says is of no use without the lock
                self._say("")
            self._file.close()
            self._file = None

    def _say(self, text: str) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())  # for readers on other hosts


def _me() -> str:
    jobs = [f"{name}={os.environ[name]}" for name in ALLOCATIONS if name in os.environ]
    return json.dumps({"process": os.getpid(), "host": platform.node(), "job": jobs[:1]})


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        told = json.load(file)
        return ", ".join([f"process {told['process']} on {told['host']}", *told["job"]])
    except (ValueError, KeyError, TypeError):  # it is just writing it
        return "another job"
