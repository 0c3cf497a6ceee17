"""``manifest.json``: the record of a checkpoint's arrays, values, metadata and files.

`colossal_mpi.checkpoint.saving` writes the manifest as the last file, and every reader begins with `read_manifest`.

Versions of the format
----------------------
2
    Files have ``parts``, each with its checksum; the manifest has a SHA-256 of itself and ``values``.
1
    Files have one ``sha256`` each.

The number rises when a reader of the previous version would misread or refuse the files. A newer version of
colossal_mpi reads all older formats: ``_UPGRADES`` holds, for each, the function that turns its manifest into one of
the next format. A reader refuses a number that is higher than its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict, cast

import numpy as np

from colossal_mpi import files
from colossal_mpi.checkpoint.directory import INDEX, MANIFEST
from colossal_mpi.errors import CheckpointError
from colossal_mpi.layout import Box, Layout, coords_of

FORMAT_VERSION = 2

PartRecord: TypeAlias = tuple[int, int, str, str]
"""Offset in bytes, size in bytes, checksum and dataset of a part of a file; a list in JSON."""


class FileRecord(TypedDict):
    """The manifest's record of a file: its size in bytes, and the checksums of its parts."""

    bytes: int
    parts: list[PartRecord]


class ArrayRecord(TypedDict):
    """The manifest's record of an array: global shape, dtype, layout and the axes of its grid."""

    shape: list[int]
    dtype: str
    layout: str
    grid: NotRequired[str]


class ValueRecord(TypedDict):
    """A number, a text or a list of numbers beside the arrays, with its units."""

    value: Any
    units: str


class ManifestHead(TypedDict):
    """The manifest without its files."""

    format_version: int
    metadata: dict[str, Any]
    values: dict[str, ValueRecord]
    arrays: dict[str, ArrayRecord]


class Manifest(ManifestHead):
    """The manifest of a checkpoint in the newest format."""

    files: dict[str, FileRecord]
    sha256: NotRequired[str]


_UNSIGNED = {"bfloat16": "uint16"}
"""Dtypes that HDF5 has no type for, and the dtype as which their bits are stored."""


def is_plain(name: str) -> bool:
    """Return whether a name has no control characters, which a terminal would obey."""
    return not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name)


def is_stored_as_bits(dtype: str) -> bool:
    """Return whether the datasets of a dtype hold its bits as unsigned integers."""
    return dtype in _UNSIGNED


def stored_dtype(dtype: str) -> np.dtype:
    """Return the dtype that the datasets of an array have."""
    return np.dtype(_UNSIGNED.get(dtype, dtype))


def axes_text(axes: Mapping[str, int]) -> str:
    """Return the axes of a grid as text, ``row=2, col=3``."""
    return ", ".join(f"{axis}={size}" for axis, size in axes.items())


@dataclass(frozen=True)
class SavedArray:
    """An array that is being saved, and the ranks of the whole grid that hold it, in the order of its own grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    axes: dict[str, int]
    ranks: list[int]

    def owned_boxes(self) -> Iterator[tuple[int, Box]]:
        """Yield each rank that writes a block, and the block's box; no two boxes overlap."""
        for place, rank in enumerate(self.ranks):
            box = self.layout.owned(self.shape, self.axes, coords_of(place, self.axes))
            if box is not None:
                yield rank, box


def manifest_head(
    arrays: Mapping[str, SavedArray], metadata: Mapping[str, Any], values: Mapping[str, ValueRecord]
) -> ManifestHead:
    """Return the manifest without its files, as it is after it has been written and read.

    Raises
    ------
    CheckpointError
        If JSON cannot hold the metadata or the values.
    """
    records = {
        name: {"shape": a.shape, "dtype": a.dtype, "layout": repr(a.layout), "grid": axes_text(a.axes)}
        for name, a in arrays.items()
    }
    head = {"format_version": FORMAT_VERSION, "metadata": metadata, "values": values, "arrays": records}
    try:
        return cast(ManifestHead, json.loads(json.dumps(head)))
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"the metadata cannot be written as JSON: {problem}") from None


def _digest(table: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps({**table, "sha256": None}, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, table: Mapping[str, object]) -> None:
    """Write a manifest, with its digest, and flush it to the disk."""
    files.write_new(directory / MANIFEST, json.dumps({**table, "sha256": _digest(table)}, indent=1))


def read_manifest(directory: str | Path) -> Manifest:
    """Return the manifest of a checkpoint, converted to the newest format.

    Parameters
    ----------
    directory : str or Path
        The directory of the checkpoint.

    Returns
    -------
    Manifest
        A dict with the keys ``format_version``, ``metadata``, ``values``, ``arrays`` and ``files``.

    Raises
    ------
    CheckpointError
        If there is no manifest, if it is damaged, or if its format is newer than this version of colossal_mpi.
    """
    path = Path(directory) / MANIFEST
    try:
        table = files.parse_json(files.read_bytes(path, within=directory))
    except OSError as problem:
        reason = f"missing or unreadable ({problem.strerror})"
        raise CheckpointError(f"no checkpoint at {Path(directory)}: {MANIFEST} is {reason}") from None
    except ValueError as problem:
        reason = str(problem) if "nested" in str(problem) else "it is no JSON"
        raise CheckpointError(f"{path} is damaged: {reason}") from None
    version = table.get("format_version") if isinstance(table, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is damaged: it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}; this version of colossal_mpi reads 1 to {FORMAT_VERSION}: "
            "use the newer one that wrote it"
        )
    if version >= 2 and table.get("sha256") != _digest(table):
        raise CheckpointError(f"{path} is damaged: it is not the file that was written (its SHA-256 differs)")
    for older in range(version, FORMAT_VERSION):
        table = _UPGRADES[older](path, table)
    _require_sound(path, table)
    return cast(Manifest, table)


def _upgrade_from_1(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    try:
        records = {
            name: {"bytes": file["bytes"], "parts": [[0, file["bytes"], f"sha256:{file['sha256']}", ""]]}
            for name, file in table["files"].items()
        }
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: it does not tell of files") from None
    return table | {"format_version": 2, "files": records, "values": {}}


_UPGRADES: dict[int, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {1: _upgrade_from_1}


def _require_sound(path: Path, table: Mapping[str, Any]) -> None:
    """Refuse a manifest of other types, of files elsewhere, of bytes without a checksum, or of more than its files."""
    from pydantic import ValidationError

    from colossal_mpi.checkpoint.schema import Table

    try:
        checked = Table.model_validate_json(json.dumps(table))
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is damaged: {place}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    outside = [name for name in checked.files if Path(name).name != name or "\0" in name]
    if outside:
        raise CheckpointError(f"{path} is damaged: {outside[0]!r} is no file of this directory")
    if INDEX not in checked.files:
        raise CheckpointError(f"{path} is damaged: it does not tell of {INDEX}")
    for name, file in checked.files.items():
        end = 0
        for start, size, *_ in sorted(file.parts):
            end = start + size if start == end else -1
        if end != file.bytes:
            raise CheckpointError(f"{path} is damaged: its checksums do not cover {name}")
    held = sum(file.bytes for file in checked.files.values())
    odd = [name for name in (*checked.arrays, *checked.values) if not is_plain(name)]
    if odd:
        raise CheckpointError(f"{path} is damaged: {odd[0]!r} names an array with control characters")
    for name, array in checked.arrays.items():
        claimed = math.prod(array.shape) * stored_dtype(array.dtype).itemsize
        if claimed > held:
            raise CheckpointError(f"{path} is damaged: {name} claims {claimed:,} bytes, and all files hold {held:,}")
