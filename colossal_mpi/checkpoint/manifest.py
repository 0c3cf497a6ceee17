"""``manifest.json``: what a checkpoint is, and what its files must be.

Versions of the format
----------------------
2
    Files have ``parts``, each with its SHA-256, in place of one; the manifest has a SHA-256 of itself and ``values``.
1
    Files have one ``sha256``.

The number rises when a reader of the one before would misread or refuse what is written. A newer version of
colossal_mpi reads all older formats: `_UPGRADES` holds, of each, how its manifest becomes one of the next format. What
is newer than the reader is refused by its number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from colossal_mpi.checkpoint.entries import Entry
from colossal_mpi.checkpoint.parts import digest
from colossal_mpi.checkpoint.place import INDEX, MANIFEST, flush
from colossal_mpi.errors import CheckpointError

FORMAT_VERSION = 2


def head(entries: Mapping[str, Entry], metadata: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest without its files, as JSON reads it.

    Raises
    ------
    CheckpointError
        If the metadata or the values are nothing that JSON holds.
    """
    arrays = {
        name: {"shape": e.shape, "dtype": e.dtype, "layout": repr(e.layout), "grid": e.grid}
        for name, e in entries.items()
    }
    table = {"format_version": FORMAT_VERSION, "metadata": metadata, "values": values, "arrays": arrays}
    try:
        return json.loads(json.dumps(table))
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"the metadata cannot be written as JSON: {problem}") from None


def _own_digest(table: Mapping[str, Any]) -> str:
    return digest(json.dumps({**table, "sha256": None}, sort_keys=True).encode())


def write_manifest(directory: Path, table: dict[str, Any]) -> None:
    """Write a manifest to the disk."""
    path = directory / MANIFEST
    path.write_text(json.dumps(table | {"sha256": _own_digest(table)}, indent=1))
    flush(path)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, as the newest format has it.

    Raises
    ------
    CheckpointError
        If there is none, it is damaged, or it is of a format that is newer than this version of colossal_mpi.
    """
    path = Path(directory) / MANIFEST
    try:
        table = json.loads(path.read_bytes())
    except OSError:
        raise CheckpointError(f"no checkpoint at {Path(directory)}: {MANIFEST} is missing or unreadable") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is no JSON") from None
    version = table.get("format_version") if isinstance(table, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is damaged: it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version}; this version of colossal_mpi reads 1 to {FORMAT_VERSION}: "
            "use the newer one that wrote it"
        )
    if version >= 2 and table.get("sha256") != _own_digest(table):
        raise CheckpointError(f"{path} is damaged: it is not the file that was written (its SHA-256 differs)")
    for older in range(version, FORMAT_VERSION):
        table = _UPGRADES[older](path, table)
    _require_whole(path, table)
    return table


def _from_1(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    try:
        files = {
            name: {"bytes": file["bytes"], "parts": [[0, file["bytes"], file["sha256"], ""]]}
            for name, file in table["files"].items()
        }
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: it does not tell of files") from None
    return table | {"format_version": 2, "files": files, "values": {}}


_UPGRADES: dict[int, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def _require_whole(path: Path, table: Mapping[str, Any]) -> None:
    if not all(isinstance(table.get(key), dict) for key in ("metadata", "values", "arrays", "files")):
        raise CheckpointError(f"{path} is damaged: it lacks metadata, values, arrays or files")
    alien = [name for name in table["files"] if Path(name).name != name]
    if alien:
        raise CheckpointError(f"{path} is damaged: {alien[0]!r} is no file of this directory")
    if INDEX not in table["files"]:
        raise CheckpointError(f"{path} is damaged: it does not tell of {INDEX}")
