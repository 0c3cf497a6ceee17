"""Distributed arrays as plain datasets of one HDF5 file, which any HDF5 tool reads and writes.

``linalg.save`` and ``linalg.load`` are the functions of this module. Only rank 0 opens the file to write. It receives
the other ranks' blocks one box at a time (`DistArray.gather_pieces`), so that HDF5 needs no MPI and no rank holds
more than its own block and one box. To read, every rank opens the file and reads its own hyperslab. Checkpoints, with
one file for each rank, are in the other modules of this package.

**Checksums:** HDF5 itself makes and verifies them, in any tool. A dataset is stored in chunks with a Fletcher-32 each,
a single number in an object header, and headers and indices have checksums of their own in the file format of HDF5
1.10. A damaged byte is then an error and never a wrong number. On one core of a server, reading fell from 5.5 to
1.8 GB/s for it and writing from 1.2 to 0.65 GB/s, from and to the cache of the system; disks are slower than either.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_mpi import comm, files
from colossal_mpi.checkpoint.directory import flush, write_error
from colossal_mpi.checkpoint.manifest import is_plain
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import CheckpointError, ColossalError, DTypeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, index_of
from colossal_mpi.platform import backend

if TYPE_CHECKING:
    import h5py

__all__ = ["load", "save", "versions"]

NUMBERS = "biufc"
"""Kinds of dtypes that can be stored. bfloat16 has kind V: h5py would write it as opaque bytes."""
_CHUNK = 1 << 20
"""Greatest size in bytes of a chunk, which HDF5 reads and verifies as a whole."""


def versions() -> tuple[str, str, bool]:
    """Return the versions of h5py and HDF5, and whether they were built with MPI.

    Returns
    -------
    h5py : str
        The version of h5py.
    hdf5 : str
        The version of HDF5.
    mpi : bool
        Whether they were built with MPI. This package does not need it.
    """
    import h5py

    return h5py.version.version, h5py.version.hdf5_version, bool(h5py.get_config().mpi)


def require_name(name: object) -> None:
    """Raise an error if HDF5 cannot take a name as the path to a dataset.

    Raises
    ------
    CheckpointError
        If the name is no text, is empty, or has a part that is empty or consists of dots.
    """
    if not isinstance(name, str) or not is_plain(name) or not all(part.strip(".") for part in name.split("/")):
        raise CheckpointError(
            f"{name!r} cannot name an array in HDF5: use parts other than '', '.' and '..', with / between, and no "
            "control characters"
        )


def save(file: str | Path, name: str, array: DistArray, overwrite: bool = False) -> None:
    """Write an array as a dataset of an HDF5 file.

    Parameters
    ----------
    file : str or Path
        The file, no link. It is created, with its directory, if it does not exist; other datasets in it stay. A new
        file has its name when it is complete. Only rank 0 of the grid must see it.
    name : str
        The name of the dataset; a ``/`` makes groups.
    array : DistArray
        The array, of any shape and in any layout, with numbers that HDF5 has a type for. Partial sums are reduced
        first.
    overwrite : bool, default False
        Whether to replace a dataset of this name. HDF5 does not free the space of the old one.

    Raises
    ------
    CheckpointError
        On all ranks, if `name` is not valid or is taken, or if the file cannot be written. A dataset that was begun is
        removed.
    DTypeError
        If HDF5 has no type for the dtype of the array, as for bfloat16.

    Notes
    -----
    **Communication:** after the reduction of partial sums rank 0 receives every element that it does not hold, once, in
    messages of at most 32 MiB of float64: n words less its own block, for n elements. Other ranks receive nothing.

    Examples
    --------
    >>> linalg.save("result.h5", "run1/energy", energy)
    >>> h5py.File("result.h5")["run1/energy"][...]
    """
    require_name(name)
    _require_type(array.dtype)
    whole = array.reduced()
    with comm.agreed(array.grid, CheckpointError):
        output = _create(Path(file), name, whole, overwrite) if whole.grid.rank == 0 else None
    with comm.agreed(array.grid, CheckpointError):
        _write(output, Path(file), name, whole)


def _require_type(dtype: object) -> None:
    import h5py

    known = backend.numpy_dtype(dtype)
    try:
        if known.kind not in NUMBERS:
            raise TypeError(known)
        h5py.h5t.py_create(known)
    except TypeError:
        raise DTypeError(f"HDF5 has no type for {known}: cast the array with .astype, to float32 for example") from None


_HEADERS = 1 << 16
"""Bytes of room for the headers and the index of a dataset."""


def _create(file: Path, name: str, array: DistArray, overwrite: bool) -> files.Hdf5Output:
    """Open the file on rank 0, a new one under a temporary name, and create the dataset in it."""
    exists = os.path.lexists(file)
    room = math.prod(array.shape) * backend.numpy_dtype(array.dtype).itemsize * 17 // 16 + _HEADERS
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not exists:
            _partial(file).unlink(missing_ok=True)
        output = files.Hdf5Output(file if exists else _partial(file), exists, room)
    except (OSError, ValueError) as problem:
        if not exists:
            with suppress(OSError, ValueError):
                _partial(file).unlink(missing_ok=True)
        reason = getattr(problem, "strerror", None) or problem
        raise CheckpointError(f"{file} cannot be written as HDF5: {reason}") from None
    try:
        _require_free(output.file, file, name, overwrite)
        _create_dataset(output.file, name, array)
    except Exception as problem:
        _discard(output, file)
        raise problem if isinstance(problem, CheckpointError) else CheckpointError(f"{file}: {problem}") from None
    return output


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _require_free(opened: h5py.File, file: Path, name: str, overwrite: bool) -> None:
    """Refuse a name that is taken, or remove the dataset of this name if that is wanted."""
    _require_no_link(opened, name)
    if name not in opened:
        return
    if not overwrite:
        raise CheckpointError(f"{file} has {name!r} already: choose another name, or overwrite=True")
    if not hasattr(opened[name], "dtype"):
        raise CheckpointError(f"{file} has {name!r} already, a group of datasets: choose another name")
    del opened[name]


def _require_no_link(opened: h5py.File, name: str) -> None:
    """Refuse a name of which a part is a link, behind which another file may lie."""
    import h5py

    group: Any = opened
    for part in name.split("/"):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None:
            return
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"a part of {name} is a link to another name or file, and links are not followed")
        group = group[part]


def _create_dataset(opened: h5py.File, name: str, array: DistArray) -> None:
    """Create a dataset with checksums: in chunks, or in its object header if it has one element."""
    import h5py

    dtype = backend.numpy_dtype(array.dtype)
    if array.shape and array.size:
        block = tuple(stop - start for start, stop in array.box)
        chunks = _chunk(block if all(block) else array.shape, dtype.itemsize)
        opened.create_dataset(name, array.shape, dtype, chunks=chunks, fletcher32=True)
        return
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    opened.create_dataset(name, array.shape, dtype, dcpl=properties)


def _chunk(block: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the shape of chunks of at most `_CHUNK` bytes that cut a block along its first dims."""
    left, chunk = max(1, _CHUNK // itemsize), list(block)
    for dim, size in enumerate(block):
        parts = min(size, -(-math.prod(chunk) // left))
        chunk[dim] = -(-size // parts)
    return tuple(chunk)


def _write(output: files.Hdf5Output | None, file: Path, name: str, array: DistArray) -> None:
    """Send the blocks to rank 0, which writes them."""

    def put(box: Box, values: np.ndarray) -> None:
        assert output is not None  # called on rank 0 only
        output.file[name][index_of(box)] = values
        output.require_room()

    # A[layout] -> A on rank 0, box by box
    failure = array.gather_pieces(put)
    if output is not None:
        _close(output, file, name, failure)


def _close(output: files.Hdf5Output, file: Path, name: str, failure: Exception | None) -> None:
    """Close the file and give a new one its name; after a failure remove what was written."""
    try:
        if failure is None:
            output.close()
            if output.path != file:
                os.replace(output.path, file)
                flush(file.parent)
            return
    except (OSError, RuntimeError) as problem:
        failure = problem
    else:
        with suppress(Exception):
            del output.file[name]
    _discard(output, file)
    raise CheckpointError(f"{name}: {write_error(file, failure)}") from failure


def _discard(output: files.Hdf5Output, file: Path) -> None:
    """Close the file, and remove it if it is new."""
    with suppress(OSError, RuntimeError, ValueError):  # it may be closed already
        output.close()
    if output.path != file:
        output.path.unlink(missing_ok=True)


def load(file: str | Path, name: str, grid: Grid, layout: Layout, dtype: Any = None) -> DistArray:
    """Return a dataset of an HDF5 file as a distributed array; each rank reads only its own block.

    Parameters
    ----------
    file : str or Path
        The file, written by any tool, which all ranks see. A dataset without checksums, as other tools write them and
        as earlier versions did, loads with a warning.
    name : str
        The name of the dataset.
    grid : Grid
        The grid of the result.
    layout : Layout
        The layout of the result, independent of how the array was saved. With partial axes, coordinate 0 holds the
        values and the others hold zeros.
    dtype : dtype, optional
        The dtype of the result; by default the dtype of the dataset, in native byte order.

    Returns
    -------
    DistArray
        The array, of the shape of the dataset.

    Raises
    ------
    CheckpointError
        On all ranks, if the file or the dataset is missing, unreadable or damaged on one of them, if the dataset is a
        link or has its elements in other files, or if it claims more elements than the file can hold.
    LayoutError
        If the layout does not fit the dims of the dataset or the grid.
    DTypeError
        If the dataset does not hold numbers.

    Notes
    -----
    **Communication:** small messages only.

    Examples
    --------
    >>> energy = linalg.load("result.h5", "run1/energy", grid, Layout("row", "col"))
    """
    file = Path(file)
    with comm.agreed(grid, CheckpointError):
        array = _read(file, name, grid, layout, dtype)
    return array


def _read(file: Path, name: str, grid: Grid, layout: Layout, dtype: Any) -> DistArray:
    if not file.exists():
        raise CheckpointError(f"no file {file}: {name!r} cannot be read")
    require_name(name)
    try:
        with files.open_hdf5(file) as opened:
            dataset = _dataset(opened, file, name)
            if grid.rank == 0 and not _has_checksums(dataset):
                sys.stderr.write(
                    f"colossal_mpi: warning: {file}: {name} has no checksums: damage would not be found; save it with "
                    "linalg.save\n"
                )
            return from_global(lambda index: np.asarray(dataset[index]), grid, layout, dataset.shape, dtype)
    except ColossalError:
        raise
    except Exception as problem:  # damaged metadata: h5py raises errors of several kinds
        reason = getattr(problem, "strerror", None) or problem
        raise CheckpointError(f"{file} cannot be read as HDF5: {reason}") from None


def _dataset(opened: h5py.File, file: Path, name: str) -> h5py.Dataset:
    try:
        dataset = files.find_dataset(opened, name)
    except KeyError:
        known = ", ".join(sorted(_datasets(opened))[:8]) or "none"
        raise CheckpointError(f"{file} has no dataset {name!r}; there are {known}") from None
    except ValueError as problem:
        raise CheckpointError(f"{file}: {problem}: a dataset must lie in the file itself") from None
    if dataset.dtype.kind not in NUMBERS:
        raise DTypeError(f"{file}: {name} is of dtype {dataset.dtype}; it must hold numbers")
    return dataset


def _has_checksums(dataset: h5py.Dataset) -> bool:
    import h5py

    compact = dataset.id.get_create_plist().get_layout() == h5py.h5d.COMPACT
    return bool(dataset.fletcher32 or compact or not dataset.size)


def _datasets(opened: h5py.File) -> list[str]:
    import h5py

    found: list[str] = []
    opened.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found
