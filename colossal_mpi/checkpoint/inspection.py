"""Verify, read and compare checkpoints box by box, without distributed arrays to fill.

``colossal-mpi inspect`` calls this module. It calls `colossal_mpi.checkpoint.checksums` for the files and reads arrays
through `colossal_mpi.checkpoint.loading.RankFiles`; the ranks share the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colossal_mpi import comm
from colossal_mpi.checkpoint import checksums
from colossal_mpi.checkpoint.directory import INDEX
from colossal_mpi.checkpoint.index import read_index
from colossal_mpi.checkpoint.loading import RankFiles
from colossal_mpi.checkpoint.manifest import ArrayRecord, FileRecord, is_stored_as_bits, read_manifest, stored_dtype
from colossal_mpi.errors import CheckpointError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Box, box_shape

_BOX_BYTES = 1 << 23
"""Bytes of a box that is read at once."""


def array_bytes(record: ArrayRecord) -> int:
    """Return the size of an array of a checkpoint.

    Parameters
    ----------
    record : ArrayRecord
        The array's record in the manifest, ``read_manifest(directory)["arrays"][name]``.

    Returns
    -------
    int
        The size of the global array, in bytes.
    """
    return math.prod(record["shape"]) * stored_dtype(record["dtype"]).itemsize


def missing_files(directory: str | Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Return a line for each file that is missing or has another size; no checksum is made.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint.
    files : mapping
        The files of its manifest, ``read_manifest(directory)["files"]``.

    Returns
    -------
    list of str
        The problems in words, empty if there are none.
    """
    empty = [checksums.Part(name, 0, 0, checksums.checksum(b"")) for name in sorted(files)]
    return list(checksums.find_damage(Path(directory), files, empty))


def verify(directory: str | Path, grid: Grid) -> list[str]:
    """Compare all bytes of a checkpoint with their checksums; each rank reads its share.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint, which all ranks can read.
    grid : Grid
        The grid whose ranks share the reading.

    Returns
    -------
    list of str
        The problems in words, the same on all ranks; empty if there are none.

    Raises
    ------
    CheckpointError
        If the manifest is missing, damaged or of a newer format.

    Notes
    -----
    **Communication:** small messages only.
    """
    files = read_manifest(directory)["files"]
    own_share = checksums.share(checksums.parts_of(files), grid.rank, grid.size)
    found = checksums.find_damage(Path(directory), files, own_share)
    lines = [line for of_rank in comm.collect(list(found), grid) for line in of_rank]
    return list(dict.fromkeys(lines))  # every rank that has a part of a missing file reports the file


def is_whole(directory: str | Path, grid: Grid) -> bool:
    """Say whether a checkpoint can be read and all of its bytes agree with their checksums.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint, which all ranks can read.
    grid : Grid
        The grid whose ranks share the reading.

    Returns
    -------
    bool
        The same on all ranks.

    Notes
    -----
    **Communication:** small messages only.
    """
    try:
        with comm.agreed(grid, CheckpointError):
            read_manifest(directory)
    except CheckpointError:
        return False
    return not verify(directory, grid)


class CheckpointReader:
    """An open checkpoint. Use it as a context manager.

    The constructor verifies the index and the checksums of the bytes that HDF5 wrote, but not of the arrays: see
    `verify`.

    Raises
    ------
    CheckpointError
        If the manifest or the index is damaged, or a file is missing or has another size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, read_manifest(directory)
        files = self.manifest["files"]
        structure = [part for part in checksums.parts_of(files) if part.file == INDEX or not part.dataset]
        checksums.require_undamaged(directory, files, structure)
        self.arrays = self.manifest["arrays"]
        self._index = read_index(directory, list(self.arrays), files)
        self._files = RankFiles(directory)

    def boxes(self, name: str) -> Iterator[Box]:
        """Yield boxes that tile an array; each has at most 8 MiB, or one row where a row is larger."""
        shape = tuple(self.arrays[name]["shape"])
        if not shape or 0 in shape:
            yield from [()] if not shape else []
            return
        rows = max(1, _BOX_BYTES * shape[0] // max(1, array_bytes(self.arrays[name])))
        for start in range(0, shape[0], rows):
            yield ((start, min(start + rows, shape[0])), *((0, n) for n in shape[1:]))

    def read(self, name: str, box: Box) -> np.ndarray:
        """Return a box of an array; bfloat16 becomes float32."""
        dtype = self.arrays[name]["dtype"]
        values = np.empty(box_shape(box), stored_dtype(dtype))
        self._files.read(name, self._index[name], box, values)
        # The 16 bits of a bfloat16 number are the upper half of the same number in float32.
        return (values.astype(np.uint32) << 16).view(np.float32) if is_stored_as_bits(dtype) else values

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()


@dataclass(frozen=True)
class Difference:
    """An array, or a value, that differs between two checkpoints.

    Parameters
    ----------
    name : str
        The name of the array or value.
    what : str
        The difference in words: it is only in one of them, has another shape or dtype, or has other elements.
    elements : int
        The number of elements that differ.
    absolute : float
        The greatest absolute difference; infinite where one element is NaN and the other is not.
    relative : float
        The greatest absolute difference over the greatest magnitude in the first checkpoint.
    """

    name: str
    what: str
    elements: int = 0
    absolute: float = 0.0
    relative: float = 0.0


def differences(first: str | Path, second: str | Path, grid: Grid) -> list[Difference]:
    """Compare two checkpoints, whatever grids they were written on; each rank compares its share of the elements.

    Parameters
    ----------
    first, second : str or Path
        The directories of the checkpoints, which all ranks can read.
    grid : Grid
        The grid whose ranks share the work.

    Returns
    -------
    list of Difference
        The differences, sorted by name, the same on all ranks.

    Raises
    ------
    CheckpointError
        On all ranks, if one of the checkpoints cannot be read.

    Notes
    -----
    **Communication:** small messages only.
    """
    with comm.agreed(grid, CheckpointError), CheckpointReader(Path(first)) as a, CheckpointReader(Path(second)) as b:
        found = list(_manifest_differences(a, b))
        known = {difference.name for difference in found}
        common = [name for name in a.arrays if name in b.arrays and name not in known]
        own = _compare_share(a, b, common, grid)
    found += _array_differences(comm.collect(own, grid))
    return sorted(found, key=lambda difference: difference.name)


def _manifest_differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[Difference]:
    """Yield the differences that the manifests show: names, shapes, dtypes and values."""
    for name in sorted({*a.arrays, *b.arrays, *a.manifest["values"], *b.manifest["values"]}):
        one, two = _summary(a, name), _summary(b, name)
        if one is None or two is None:
            yield Difference(name, "only in the first" if two is None else "only in the second")
        elif one != two:
            yield Difference(name, f"{one}, {two}")


def _summary(reader: CheckpointReader, name: str) -> str | None:
    """Return dtype and shape of an array, or a value as text; None if the checkpoint has neither."""
    if name in reader.arrays:
        record = reader.arrays[name]
        return f"{record['dtype']}{tuple(record['shape'])}"
    value = reader.manifest["values"].get(name)
    return None if value is None else str(value["value"])


@dataclass(frozen=True)
class _Comparison:
    """Compared elements: how many differ, the greatest difference, the greatest magnitude in the first checkpoint."""

    elements: int = 0
    absolute: float = 0.0
    magnitude: float = 0.0

    def add(self, other: _Comparison) -> _Comparison:
        return _Comparison(
            self.elements + other.elements,
            max(self.absolute, other.absolute),
            max(self.magnitude, other.magnitude),
        )


def _compare(x: np.ndarray, y: np.ndarray) -> _Comparison:
    wide = np.complex128 if x.dtype.kind == "c" else np.float64
    differs = (x != y) & ~((x != x) & (y != y))
    distances = np.abs(x[differs].astype(wide) - y[differs].astype(wide))
    distances = np.where(np.isnan(distances), np.inf, distances)
    magnitudes = np.abs(x.astype(wide))
    return _Comparison(
        int(differs.sum()),
        float(distances.max(initial=0.0)),
        float(magnitudes[np.isfinite(magnitudes)].max(initial=0.0)),
    )


def _compare_share(a: CheckpointReader, b: CheckpointReader, names: list[str], grid: Grid) -> dict[str, _Comparison]:
    work = [(name, box) for name in names for box in a.boxes(name)]
    compared: dict[str, _Comparison] = {}
    for name, box in work[grid.rank :: grid.size]:
        compared[name] = compared.get(name, _Comparison()).add(_compare(a.read(name, box), b.read(name, box)))
    return compared


def _array_differences(shares: list[dict[str, _Comparison]]) -> Iterator[Difference]:
    whole: dict[str, _Comparison] = {}
    for of_rank in shares:
        for name, compared in of_rank.items():
            whole[name] = whole.get(name, _Comparison()).add(compared)
    for name, compared in whole.items():
        if compared.elements:
            relative = compared.absolute / compared.magnitude if compared.magnitude else float("inf")
            yield Difference(name, "other elements", compared.elements, compared.absolute, relative)
