"""``colossal-mpi convert``: weights between Hugging Face's directories and checkpoints of HDF5."""

from __future__ import annotations

import json
from pathlib import Path

from colossal_mpi import checkpoint
from colossal_mpi.apps.rundir import RunDirectory
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, OptionError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import Layer, Parallelism, models


def convert(source: Path, target: Path, to: str, most: int) -> None:
    """Write `target` from `source`; every rank has a part of each matrix.

    Parameters
    ----------
    source, target : path
    to : {"hf", "cm"}
        "hf" reads a checkpoint, or the latest of a run; "cm" reads a directory of Hugging Face.
    most : int
        Bytes of weights in one safetensors file.

    Raises
    ------
    OptionError
        If there is no such format.
    CheckpointError
        If `source` is none of its kind, or `target` cannot be written.
    """
    parallelism = Parallelism(Grid(col=world_size()), "1d")
    if to == "cm":
        _to_checkpoint(source, target, parallelism)
    elif to == "hf":
        _to_hugging_face(source, target, parallelism, most)
    else:
        raise OptionError(f"convert --to {to!r}: use 'hf' or 'cm'")


def _weights(model: Layer) -> dict[str, DistArray]:
    """Return the weights by the names that the trainer gives them."""
    return {f"weights/{p.name}": p.value for p in model.parameters()}


def _to_checkpoint(source: Path, target: Path, parallelism: Parallelism) -> None:
    model = models.from_pretrained(source, parallelism)
    table = json.loads((source / "config.json").read_text(encoding="utf-8"))
    metadata = {"model": models.describe(model), "huggingface": table}
    checkpoint.save(target, _weights(model), metadata, parallelism.grid)


def _to_hugging_face(source: Path, target: Path, parallelism: Parallelism, most: int) -> None:
    if (source / "checkpoints").is_dir():
        source = RunDirectory(source).latest()
    metadata = checkpoint.read_manifest(source)["metadata"]
    if "model" not in metadata:
        raise CheckpointError(f"{source} does not say of which model it is: its metadata have no 'model'")
    model = models.make(metadata["model"], parallelism)
    checkpoint.load(source, _weights(model), parallelism.grid, besides=True)
    models.save_pretrained(model, target, most=most, extra=metadata.get("huggingface"))
