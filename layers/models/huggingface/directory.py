"""Hugging Face directories on disk: ``config.json`` and safetensors, read by every rank and written by one.

`from_pretrained` reads with `Reader`, `save_pretrained` writes with `Writer`. Reading needs the package safetensors.
Writing does not: ``safetensors.save_file`` takes whole tensors, which may be more than a rank can hold, and the format
is simple enough to write box by box: the length of a JSON header, the header, and the tensors one after the other in
row-major order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from colossal_mpi import files
from colossal_mpi.checkpoint import flush
from colossal_mpi.errors import CheckpointError
from colossal_mpi.layers.models.huggingface.settings import json_object
from colossal_mpi.layout import Box, index_of

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DIGESTS = "SHA256SUMS"
"""The file of the digests of the files of weights, of which safetensors has none; ``sha256sum -c`` reads it."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""NumPy's name for each dtype of safetensors that weights may have."""
_CODES = {name: code for code, name in DTYPES.items()}

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of each tensor by name, in the order in which they are written."""


class _Slice(Protocol):
    """A tensor in a safetensors file, of which any part can be read."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class _File(Protocol):
    """A safetensors file."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...


class Reader:
    """A directory that is open for reading.

    Files are opened when they are first needed and mapped into memory: a rank reads only the bytes of its own boxes.

    Parameters
    ----------
    directory : path
        A directory that ``save_pretrained`` of transformers or of this package wrote.

    Raises
    ------
    CheckpointError
        If it is no such directory, is damaged, or the package safetensors is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = self._json(CONFIG)
        self._files = self._file_of_each_tensor()
        self._opened: dict[str, _File] = {}

    def _json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            content = files.read_bytes(path)
        except OSError as problem:
            raise CheckpointError(
                f"{path} cannot be read: {problem.strerror}; give a directory that transformers' save_pretrained wrote"
            ) from None
        return json_object(path, content)

    def _file_of_each_tensor(self) -> dict[str, str]:
        if (self.directory / INDEX).is_file():
            file_of = self._json(INDEX).get("weight_map")
            if not isinstance(file_of, dict) or not all(_is_beside(file) for file in file_of.values()):
                raise CheckpointError(f"{self.directory / INDEX} is damaged: it maps no tensors to files beside it")
            return file_of
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(_open(self.directory / SINGLE).keys(), SINGLE)
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))[:1]
        remedy = f"; where you trust the pickle {pickled[0]}, load it with transformers and save it" if pickled else ""
        raise CheckpointError(f"{self.directory} has neither {SINGLE} nor {INDEX}{remedy}")

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Compare the files of weights with their digests, where the directory has them; one of `size` ranks' share.

        Raises
        ------
        CheckpointError
            If a file differs from its digest or is missing, or the digests are damaged.
        """
        path = self.directory / DIGESTS
        if not path.exists():
            return
        try:
            lines = files.read_bytes(path, files.LARGEST_CONFIG).decode().splitlines()
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"{path} cannot be read: {getattr(problem, 'strerror', problem)}") from None
        found = [re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\0]+)", line) for line in lines]
        if not found or not all(found):
            raise CheckpointError(f"{path} is damaged: each line must be a SHA-256 and the name of a file beside it")
        digests = {match[2]: match[1] for match in found if match}
        unknown = sorted({*self._files.values()} - set(digests))
        if unknown:
            raise CheckpointError(f"{path} has no digest of {unknown[0]}: remove {DIGESTS} if the files were changed")
        for name, digest in sorted(digests.items())[rank::size]:
            if _digest(self.directory / name) != digest:
                raise CheckpointError(
                    f"{self.directory / name} is damaged: its SHA-256 is not the one in {DIGESTS}; remove {DIGESTS} if "
                    "the file was changed on purpose"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _slice(self, name: str) -> _Slice:
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = _open(self.directory / file)
        try:
            return self._opened[file].get_slice(name)
        except Exception as problem:  # safetensors raises an error of its own, which does not name the file
            raise CheckpointError(f"{self.directory / file}: {problem}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def code(self, name: str) -> str:
        """Return safetensors' name of the dtype of a tensor."""
        return self._slice(name).get_dtype()

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype of a tensor.

        Raises
        ------
        CheckpointError
            If weights cannot have it: a quantised model stores integers, for example.
        """
        code = self.code(name)
        if code not in DTYPES:
            raise CheckpointError(f"{self.directory}: {name} is of dtype {code}; it must be {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str, box: Box) -> np.ndarray:
        """Return a box of a tensor; no other bytes of the tensor are read."""
        if self.dtype(name) == "bfloat16":
            _require("ml_dtypes")  # its import gives NumPy the dtype
        return self._slice(name)[index_of(box)]


def _is_beside(file: object) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file and "\0" not in file


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    try:
        with files.open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None


def _open(path: Path) -> _File:
    safetensors = _require("safetensors")
    try:
        files.open_regular(path).close()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    try:
        return cast("_File", safetensors.safe_open(path, framework="numpy"))
    except Exception as problem:  # a missing file or a damaged header
        raise CheckpointError(f"{path} cannot be read as safetensors: {problem}") from None


def _require(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise CheckpointError(
            f"reading Hugging Face directories needs the package {package.replace('_', '-')}: "
            "pip install 'colossal-mpi[hf]'"
        ) from None


class Writer:
    """A directory that is being written, under a temporary name until `close`.

    Parameters
    ----------
    directory : path
        It must not exist, or be empty. Its parent is created.
    config : mapping
        The contents of ``config.json``.
    tensors : mapping
        Shape and dtype of each tensor.
    most : int
        Bytes of weights in one file; a single larger tensor still goes into one file. With several files, an index
        maps each tensor to its file.
    settings : mapping
        Contents of files of settings by name.

    Raises
    ------
    CheckpointError
        If the directory is not empty.
    OSError
        If the disk has no room.
    """

    def __init__(
        self,
        directory: str | Path,
        config: Mapping[str, Any],
        tensors: Tensors,
        most: int,
        settings: Mapping[str, bytes],
    ) -> None:
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
        for name, content in settings.items():
            (self._partial / name).write_bytes(content)
        divided = _divide(tensors, most)
        count = len(divided)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        for name, stored in zip(names, divided, strict=True):
            self._create(self._partial / name, {tensor: tensors[tensor] for tensor in stored})
        if count > 1:
            index = {
                "metadata": {"total_size": sum(_bytes(*entry) for entry in tensors.values())},
                "weight_map": {tensor: name for name, stored in zip(names, divided, strict=True) for tensor in stored},
            }
            (self._partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _create(self, path: Path, tensors: Tensors) -> None:
        """Create a file of its final size, so that a full disk is an error now and not a signal at a later write."""
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
        """Flush everything to disk and rename the directory; after a failure, remove it and raise CheckpointError."""
        if failure is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise CheckpointError(f"{self.directory} cannot be written: {failure}") from failure
        weights = sorted({path.name for path, *_ in self._places.values()})
        digests = "".join(f"{_digest(self._partial / name)}  {name}\n" for name in weights)
        (self._partial / DIGESTS).write_text(digests, encoding="utf-8")
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
