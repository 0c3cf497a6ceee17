"""HDF5 files: datasets that lie in the file itself, and writing that survives a full disk."""

from __future__ import annotations

import errno
import fcntl
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_mpi.files.regular import FLAGS, failure, open_regular, require_regular

if TYPE_CHECKING:
    import h5py

_LARGEST_CHUNK = 1 << 28
"""Greatest size in bytes of a chunk, which HDF5 unpacks as a whole."""
_PACKED = 1 << 10
"""Greatest ratio of the size of a dataset to its size in the file. Deflate, the strongest common one, reaches 1032."""
_UNPACKED = 1 << 26
"""Size in bytes below which a dataset may have any such ratio."""
_CACHE = 1 << 26
"""Bytes of chunks that HDF5 keeps while it writes: boxes of the ranks may end inside of a chunk."""
_HELD = (errno.EACCES, errno.EAGAIN)


def open_hdf5(path: str | Path, within: str | Path | None = None, **options: Any) -> h5py.File:
    """Open an HDF5 file for reading.

    Parameters
    ----------
    path : str or Path
        The file.
    within : str or Path, optional
        A directory that the file must lie in once links are resolved.
    **options
        Further options of ``h5py.File``.

    Returns
    -------
    h5py.File
        The file. Read only datasets that `find_dataset` returns.

    Raises
    ------
    OSError
        If it cannot be opened, is no regular file or no HDF5 file, or lies outside of `within`.
    """
    import h5py

    with open_regular(path, within):
        pass
    try:
        return h5py.File(path, "r", **options)
    except Exception as problem:  # damaged metadata: h5py raises errors of several kinds
        reason = "it is no HDF5 file" if "signature" in str(problem) else f"it is no intact HDF5 file ({problem})"
        raise failure(errno.EINVAL, reason, path) from None


def find_dataset(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset that lies in an open HDF5 file itself, of a size that its file can hold.

    Parameters
    ----------
    file : h5py.File
        The file.
    name : str
        The path of the dataset.

    Returns
    -------
    h5py.Dataset
        The dataset.

    Raises
    ------
    KeyError
        If there is no dataset of this name.
    ValueError
        If a part of the path is a link, the dataset's elements lie in other files, or it claims to be so large that the
        file cannot hold it; the message is the reason.
    """
    import h5py

    found = file
    parts = name.split("/")
    for depth, part in enumerate(parts, 1):
        link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
        if link is None:
            raise KeyError(name)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{'/'.join(parts[:depth])} is a link to another name or file")
        found = found[part]
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise KeyError(name)
    if found.is_virtual or found.external:
        raise ValueError(f"the elements of {name} lie in other files")
    _require_size(found, os.stat(file.filename).st_size)
    return found


def _require_size(dataset: h5py.Dataset, size: int) -> None:
    """Refuse a dataset that claims more elements than a file of `size` bytes can hold."""
    claimed, stored = math.prod(dataset.shape) * dataset.dtype.itemsize, dataset.id.get_storage_size()
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if stored > size:
        raise ValueError(f"{dataset.name.strip('/')} has {stored:,} bytes, and the file has {size:,}")
    if claimed > max(_UNPACKED, _PACKED * stored):
        raise ValueError(f"{dataset.name.strip('/')} claims {claimed:,} bytes, of which the file holds {stored:,}")
    if dataset.chunks and chunk > max(_LARGEST_CHUNK, size):
        raise ValueError(
            f"{dataset.name.strip('/')} has chunks of {chunk:,} bytes, and they may have {_LARGEST_CHUNK:,}"
        )


class _Disk(io.FileIO):
    """A file that accepts and drops everything after its first failure to write.

    HDF5 can crash when a write fails, since it keeps what it could not write and tries again while it closes the file.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = left.nbytes
        try:
            while left.nbytes and self.failure is None:
                left = left[super().write(left) :]
        except OSError as problem:
            self.failure = problem
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size) if self.failure is None else size or 0
        except OSError as problem:
            self.failure = problem
            return size or 0


class Hdf5Output:
    """An HDF5 file that is being written, in the format of HDF5 1.10, whose headers and indices have checksums.

    A disk without room is an error of the constructor, before anything is changed, and any other failure to write is
    one of `close`: HDF5 itself would crash.

    Parameters
    ----------
    path : Path
        The file, no link.
    exists : bool
        Whether to change an existing file; otherwise the file must not exist.
    room : int
        Bytes that will be added.

    Raises
    ------
    OSError
        If the file cannot be opened, is a link or no HDF5 file, is open in another program, or the disk has no room.
    """

    def __init__(self, path: Path, exists: bool = False, room: int = 0) -> None:
        import h5py

        flags = os.O_RDWR | os.O_NOFOLLOW | FLAGS | (0 if exists else os.O_CREAT | os.O_EXCL)
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as problem:
            if problem.errno == errno.ELOOP:
                raise failure(errno.ELOOP, f"it is a link: name {os.path.realpath(path)} itself", path) from None
            raise
        self.path, self._disk = path, _Disk(descriptor, "r+b")
        try:
            require_regular(descriptor, path)
            _lock(descriptor, path)
            self.file = h5py.File(self._disk, "r+" if exists else "w", libver="v110", rdcc_nbytes=_CACHE)
        except OSError as problem:
            self._disk.close()
            if problem.errno is None:  # of HDF5
                raise failure(errno.EINVAL, "it is no HDF5 file", path) from None
            raise
        try:
            _reserve(descriptor, room)
        except OSError:
            self.file.close()
            self._disk.close()
            raise

    def require_room(self) -> None:
        """Raise the first failure to write, an OSError, if there was one."""
        if self._disk.failure is not None:
            raise self._disk.failure

    def close(self) -> None:
        """Close the file and flush it to the disk.

        Raises
        ------
        OSError
            If anything could not be written.
        """
        try:
            self.file.close()
            self.require_room()
            self._disk.flush()
            os.fsync(self._disk.fileno())
        finally:
            with suppress(OSError):
                self._disk.close()


def _lock(descriptor: int, path: Path) -> None:
    """Lock a file as HDF5 does, so that two programs never write it at once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in _HELD:  # others: a file system without locks
            raise failure(problem.errno, "it is open in another program", path) from None


def _reserve(descriptor: int, room: int) -> None:
    size = os.fstat(descriptor).st_size
    if room and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, size, room)
        except OSError as problem:
            os.ftruncate(descriptor, size)
            if problem.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of a file system that cannot reserve
                raise


@contextmanager
def new_hdf5(path: Path, room: int = 0) -> Iterator[h5py.File]:
    """Write a new HDF5 file inside the context, and flush it to the disk at its end.

    Parameters
    ----------
    path : Path
        The file, which must not exist.
    room : int
        Bytes that it will need.

    Yields
    ------
    h5py.File
        The open file.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    output = Hdf5Output(path, room=room)
    try:
        yield output.file
    except BaseException:
        with suppress(OSError, RuntimeError):
            output.close()
        raise
    output.close()
