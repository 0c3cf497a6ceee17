"""Distributed arrays as plain datasets of one HDF5 file, which any HDF5 tool reads and writes.

Rank 0 alone opens the file to write, and gets the others' blocks a piece at a time, so that HDF5 needs no MPI and no
rank ever holds more than its own block and one piece. To read, every rank opens the file and reads its own hyperslab.
Checkpoints, with their checksums and a file for each rank, are in `colossal_mpi.checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray, from_global
from colossal_mpi.errors import CheckpointError, DTypeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, Layout, index_of
from colossal_mpi.platform import backend

NUMBERS = "biufc"
"""Kinds of dtypes that are stored. bfloat16 is none: h5py would write it as opaque bytes."""


def built() -> tuple[str, str, bool]:
    """Return the versions of h5py and of HDF5, and whether they were built with MPI, which nothing here needs."""
    import h5py

    return h5py.version.version, h5py.version.hdf5_version, bool(h5py.get_config().mpi)


def require_name(name: Any) -> None:
    """Refuse what HDF5 cannot take for a path to a dataset.

    Raises
    ------
    CheckpointError
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if not all(part.strip(".") for part in parts) or "\0" in name:
        raise CheckpointError(
            f"{name!r} cannot name an array in HDF5: use parts other than '', '.' and '..', with / between"
        )


def save(file: str | Path, name: str, array: DistArray, overwrite: bool = False) -> None:
    """Write an array as a dataset of an HDF5 file.

    Parameters
    ----------
    file : path
        Made, with its directory, if it does not exist; other datasets in it stay. Only rank 0 of the grid must see it.
    name : str
        Of the dataset; ``/`` makes groups.
    array : DistArray
        In any layout; partial sums are reduced first.
    overwrite : bool
        Replace a dataset of this name. HDF5 does not give the old one's space back.

    Raises
    ------
    CheckpointError
        On all ranks, if `name` is no name or taken, or the file cannot be written. A dataset that was begun is removed.
    DTypeError
        If HDF5 has no type for that of the array, as for bfloat16.

    Notes
    -----
    **Communication:** after the reduction of partial sums rank 0 receives every element that it does not hold, once, in
    pieces of at most 32 MiB of float64: n less its own block.

    Examples
    --------
    >>> linalg.save("result.h5", "run1/energy", energy)
    >>> h5py.File("result.h5")["run1/energy"][...]
    """
    import h5py

    require_name(name)
    _require_type(h5py, array.dtype)
    whole = array.reduced()
    with comm.agreed(array.grid, CheckpointError):
        opened = _create(h5py, Path(file), name, whole, overwrite) if whole.grid.rank == 0 else None
    with comm.agreed(array.grid, CheckpointError):
        _write(opened, name, whole)


def _require_type(h5py: Any, dtype: Any) -> None:
    known = backend.numpy_dtype(dtype)
    try:
        if known.kind not in NUMBERS:
            raise TypeError(known)
        h5py.h5t.py_create(known)
    except TypeError:
        raise DTypeError(f"HDF5 has no type for {known}: cast the array with .astype, to float32 for example") from None


def _create(h5py: Any, file: Path, name: str, array: DistArray, overwrite: bool) -> Any:
    """Open the file on rank 0 and make the dataset in it."""
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


def _write(opened: Any, name: str, array: DistArray) -> None:
    """Bring the pieces to rank 0 and write them."""

    def put(box: Box, values: np.ndarray) -> None:
        opened[name][index_of(box)] = values

    failure = array.gather_pieces(put)
    if opened is not None:
        _close(opened, name, failure)


def _close(opened: Any, name: str, failure: Exception | None) -> None:
    file = opened.filename
    try:
        if failure is not None:
            del opened[name]
    finally:
        opened.close()
    if failure is not None:
        raise CheckpointError(f"{file}: {name} cannot be written: {failure}") from failure


def load(file: str | Path, name: str, grid: Grid, layout: Layout, dtype: Any = None) -> DistArray:
    """Return a dataset of an HDF5 file as a distributed array; each rank reads its own block alone.

    Parameters
    ----------
    file : path
        That all ranks see, whoever wrote it.
    name : str
    grid : Grid
    layout : Layout
        Any: not the one in which the array was saved. With partial axes, coordinate 0 holds the values.
    dtype : optional
        Of the result; the dataset's own by default, in native byte order.

    Raises
    ------
    CheckpointError
        On all ranks, if the file or the dataset is missing or unreadable on one of them.
    LayoutError
        If the layout does not fit the dims of the dataset or the grid.
    DTypeError
        If the dataset holds no numbers.

    Notes
    -----
    **Communication:** small messages only.
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
                known = ", ".join(sorted(_datasets(h5py, opened))[:8]) or "none"
                raise CheckpointError(f"{file} has no dataset {name!r}; there are {known}")
            if dataset.dtype.kind not in NUMBERS:
                raise DTypeError(f"{file}: {name} is of dtype {dataset.dtype}; it must hold numbers")
            return from_global(lambda index: np.asarray(dataset[index]), grid, layout, dataset.shape, dtype)
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be read as HDF5: {problem}") from None


def _datasets(h5py: Any, opened: Any) -> list[str]:
    found: list[str] = []
    opened.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found
