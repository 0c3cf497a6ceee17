"""``colossal-mpi convert``: weights between Hugging Face's directories and checkpoints of HDF5."""

from __future__ import annotations

import json
from pathlib import Path

from colossal_mpi import checkpoint
from colossal_mpi.apps.training import saved
from colossal_mpi.errors import OptionError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import Parallelism, models


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


def _to_checkpoint(source: Path, target: Path, parallelism: Parallelism) -> None:
    model = models.from_pretrained(source, parallelism)
    table = json.loads((source / "config.json").read_text(encoding="utf-8"))
    metadata = {"model": models.describe(model), "huggingface": table}
    checkpoint.save(target, saved.weights(model.parameters()), metadata, parallelism.grid)


def _to_hugging_face(source: Path, target: Path, parallelism: Parallelism, most: int) -> None:
    source = saved.checkpoint_of(source)
    metadata = saved.metadata_of(source)
    model = models.from_description(metadata["model"], parallelism)
    saved.load(source, model.parameters(), parallelism.grid)
    models.save_pretrained(model, target, most=most, extra=metadata.get("huggingface"))
