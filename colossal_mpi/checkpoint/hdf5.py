"""Distributed arrays as plain datasets of one HDF5 file, which any HDF5 tool reads and writes.

``linalg.save`` and ``linalg.load`` are the functions of this module. Only rank 0 opens the file to write. It receives
the other ranks' blocks one box at a time (`DistArray.gather_pieces`), so that HDF5 needs no MPI and no rank holds
more than its own block and one box. To read, every rank opens the file and reads its own hyperslab. Checkpoints, with
checksums and one file for each rank, are in the other modules of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import CheckpointError, DTypeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, index_of
from colossal_mpi.platform import backend

if TYPE_CHECKING:
    import h5py

__all__ = ["load", "save", "versions"]

NUMBERS = "biufc"
"""Kinds of dtypes that can be stored. bfloat16 has kind V: h5py would write it as opaque bytes."""


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
    if not isinstance(name, str) or "\0" in name or not all(part.strip(".") for part in name.split("/")):
        raise CheckpointError(
            f"{name!r} cannot name an array in HDF5: use parts other than '', '.' and '..', with / between"
        )


def save(file: str | Path, name: str, array: DistArray, overwrite: bool = False) -> None:
    """Write an array as a dataset of an HDF5 file.

    Parameters
    ----------
    file : str or Path
        The file. It is created, with its directory, if it does not exist; other datasets in it stay. Only rank 0 of the
        grid must see it.
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
        opened = _create(Path(file), name, whole, overwrite) if whole.grid.rank == 0 else None
    with comm.agreed(array.grid, CheckpointError):
        _write(opened, name, whole)


def _require_type(dtype: object) -> None:
    import h5py

    known = backend.numpy_dtype(dtype)
    try:
        if known.kind not in NUMBERS:
            raise TypeError(known)
        h5py.h5t.py_create(known)
    except TypeError:
        raise DTypeError(f"HDF5 has no type for {known}: cast the array with .astype, to float32 for example") from None


def _create(file: Path, name: str, array: DistArray, overwrite: bool) -> h5py.File:
    """Open the file on rank 0 and create the dataset in it."""
    import h5py

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened = h5py.File(file, "a")
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written as HDF5: {problem}") from None
    try:
        if overwrite and isinstance(opened.get(name), h5py.Dataset):
            del opened[name]
        if name in opened:
            raise CheckpointError(f"{file} has {name!r} already: choose another name, or overwrite=True")
        opened.create_dataset(name, array.shape, backend.numpy_dtype(array.dtype))
    except Exception as problem:
        opened.close()
        raise problem if isinstance(problem, CheckpointError) else CheckpointError(f"{file}: {problem}") from None
    return opened


def _write(opened: h5py.File | None, name: str, array: DistArray) -> None:
    """Send the blocks to rank 0, which writes them."""

    def put(box: Box, values: np.ndarray) -> None:
        assert opened is not None  # called on rank 0 only
        opened[name][index_of(box)] = values

    # A[layout] -> A on rank 0, box by box
    failure = array.gather_pieces(put)
    if opened is not None:
        _close(opened, name, failure)


def _close(opened: h5py.File, name: str, failure: Exception | None) -> None:
    file = opened.filename
    try:
        if failure is not None:
            del opened[name]
    finally:
        opened.close()
    if failure is not None:
        raise CheckpointError(f"{file}: {name} cannot be written: {failure}") from failure


def load(file: str | Path, name: str, grid: Grid, layout: Layout, dtype: Any = None) -> DistArray:
    """Return a dataset of an HDF5 file as a distributed array; each rank reads only its own block.

    Parameters
    ----------
    file : str or Path
        The file, written by any tool, which all ranks see.
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
        On all ranks, if the file or the dataset is missing or unreadable on one of them.
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
    import h5py

    if not file.is_file():
        raise CheckpointError(f"no file {file}: {name!r} cannot be read")
    require_name(name)
    try:
        with h5py.File(file, "r") as opened:
            dataset = opened.get(name)
            if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
                known = ", ".join(sorted(_datasets(opened))[:8]) or "none"
                raise CheckpointError(f"{file} has no dataset {name!r}; there are {known}")
            if dataset.dtype.kind not in NUMBERS:
                raise DTypeError(f"{file}: {name} is of dtype {dataset.dtype}; it must hold numbers")
            return from_global(lambda index: np.asarray(dataset[index]), grid, layout, dataset.shape, dtype)
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be read as HDF5: {problem}") from None


def _datasets(opened: h5py.File) -> list[str]:
    import h5py

    found: list[str] = []
    opened.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found
