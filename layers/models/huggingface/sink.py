"""A Hugging Face directory to write, by one rank, a piece of a tensor at a time.

``safetensors.save_file`` takes whole tensors, which may be more than a rank can hold. The format is simple enough: the
length of a JSON header, the header, and the tensors one after the other in row-major order.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi.checkpoint import flush
from colossal_mpi.errors import CheckpointError
from colossal_mpi.layers.models.huggingface.source import CONFIG, DTYPES, INDEX, SINGLE
from colossal_mpi.layout import Box, index_of

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype by name, in the order in which they are written."""

_CODES = {name: code for code, name in DTYPES.items()}


class Sink:
    """A directory being written, under a temporary name until `close`.

    Parameters
    ----------
    directory : path
        Must not exist, or be empty; its parent is made.
    config : mapping
        For ``config.json``.
    tensors : mapping
    most : int
        Bytes of weights in one file, unless one tensor has more. If they need several, an index says which is where.

    Raises
    ------
    CheckpointError
        If the directory holds something, or the disk has no room.
    """

    def __init__(self, directory: str | Path, config: Mapping[str, Any], tensors: Tensors, most: int) -> None:
        self.directory = Path(directory)
        self._partial = self.directory.with_name(f".{self.directory.name}.partial")
        if self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise CheckpointError(
                f"{self.directory} exists: a checkpoint is never overwritten; choose another name or remove it"
            )
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._places: dict[str, tuple[Path, int, tuple[int, ...], np.dtype]] = {}
        (self._partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        self._lay_out(tensors, most)

    def _lay_out(self, tensors: Tensors, most: int) -> None:
        files = _divide(tensors, most)
        names = [SINGLE] if len(files) == 1 else [_numbered(i, len(files)) for i in range(len(files))]
        for name, held in zip(names, files, strict=True):
            self._create(self._partial / name, {tensor: tensors[tensor] for tensor in held})
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(_bytes(*entry) for entry in tensors.values())},
                "weight_map": {tensor: name for name, held in zip(names, files, strict=True) for tensor in held},
            }
            (self._partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _create(self, path: Path, tensors: Tensors) -> None:
        """Make a file of its final size: a disk that is full says so now, and not by a signal at a later write."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in tensors.items():
            start, end = end, end + _bytes(shape, dtype)
            header[name] = {"dtype": _CODES[dtype.name], "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            first = file.tell()
            if end:
                file.flush()
                os.posix_fallocate(file.fileno(), first, end)
        for name, (shape, dtype) in tensors.items():
            place = first + header[name]["data_offsets"][0]
            self._places[name] = (path, place, shape, dtype.newbyteorder("<"))

    def write(self, name: str, box: Box, values: np.ndarray) -> None:
        """Write a box of a tensor."""
        path, offset, shape, dtype = self._places[name]
        np.memmap(path, dtype, "r+", offset, shape)[index_of(box)] = values

    def close(self, failure: Exception | None = None) -> None:
        """Bring everything to the disk and give the directory its name; remove it and raise after a failure."""
        if failure is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise CheckpointError(f"{self.directory} cannot be written: {failure}") from failure
        for path in [*self._partial.iterdir(), self._partial]:
            flush(path)
        self._partial.rename(self.directory)
        flush(self.directory.parent)


def _bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _divide(tensors: Tensors, most: int) -> list[list[str]]:
    """Return the names of the tensors of each file, in order."""
    files: list[list[str]] = [[]]
    size = 0
    for name, entry in tensors.items():
        if files[-1] and size + _bytes(*entry) > most:
            files.append([])
            size = 0
        files[-1].append(name)
        size += _bytes(*entry)
    return files


def _numbered(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"
