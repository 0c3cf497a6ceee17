"""A Hugging Face directory to read: ``config.json`` and safetensors, of which each rank reads what it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi.errors import CheckpointError
from colossal_mpi.layout import Box, index_of

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes of safetensors that hold weights here, and NumPy's names of them."""


class Source:
    """A directory opened to read. Files are opened when first needed and mapped: a slice reads its own bytes alone.

    Raises
    ------
    CheckpointError
        If it is no directory of `transformers` with safetensors, or the package safetensors is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = self._json(CONFIG)
        self._files = self._names()
        self._opened: dict[str, Any] = {}

    def _json(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise CheckpointError(
                f"{path} cannot be read: {problem.strerror}; give a directory that transformers' save_pretrained wrote"
            ) from None
        except ValueError:
            table = None
        if not isinstance(table, dict):
            raise CheckpointError(f"{path} is damaged: it is no JSON object")
        return table

    def _names(self) -> dict[str, str]:
        """Return the file of each tensor."""
        if (self.directory / INDEX).is_file():
            files = self._json(INDEX).get("weight_map")
            if not isinstance(files, dict) or not all(Path(str(file)).name == file for file in files.values()):
                raise CheckpointError(f"{self.directory / INDEX} is damaged: it maps no tensors to files beside it")
            return files
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(_open(self.directory / SINGLE).keys(), SINGLE)
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))[:1]
        remedy = f"; where you trust the pickle {pickled[0]}, load it with transformers and save it" if pickled else ""
        raise CheckpointError(f"{self.directory} has neither {SINGLE} nor {INDEX}{remedy}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _slice(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = _open(self.directory / file)
        try:
            return self._opened[file].get_slice(name)
        except Exception as problem:  # safetensors raises its own kind, which names no file
            raise CheckpointError(f"{self.directory / file}: {problem}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def code(self, name: str) -> str:
        """Return the name of the dtype of a tensor in safetensors."""
        return self._slice(name).get_dtype()

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype of a tensor.

        Raises
        ------
        CheckpointError
            If it is none of weights: integers of a quantised model, for example.
        """
        kind = self.code(name)
        if kind not in DTYPES:
            raise CheckpointError(f"{self.directory}: {name} is of dtype {kind}; it must be {', '.join(DTYPES)}")
        return DTYPES[kind]

    def read(self, name: str, box: Box) -> np.ndarray:
        """Return a box of a tensor; nothing else of it is read."""
        if self.dtype(name) == "bfloat16":
            _require("ml_dtypes")  # gives NumPy the dtype by being imported
        return self._slice(name)[index_of(box)]


def _open(path: Path) -> Any:
    safetensors = _require("safetensors")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except Exception as problem:  # a missing file, a damaged header
        raise CheckpointError(f"{path} cannot be read as safetensors: {problem}") from None


def _require(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise CheckpointError(
            f"reading Hugging Face directories needs the package {package.replace('_', '-')}: "
            "pip install 'colossal-mpi[hf]'"
        ) from None
