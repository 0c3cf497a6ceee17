"""Models from what runs and conversions have saved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from colossal_mpi import checkpoint
from colossal_mpi.apps.training.run_directory import RunDirectory
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, GridError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Parallelism, models
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layers.pipeline import PIPE, Pipeline, partition, stage_grid


def weights(parameters: Iterable[Parameter], kind: str = "weights") -> dict[str, DistArray]:
    """Return weights by the names that checkpoints give them, or their averages."""
    return {f"{kind}/{p.name}": p.value for p in parameters}


def load(source: Path, parameters: Iterable[Parameter], grid: Grid) -> None:
    """Fill weights from a checkpoint: with their moving averages, where a run has kept these."""
    averaged = any(name.startswith("average/") for name in checkpoint.read_manifest(source)["arrays"])
    checkpoint.load(source, weights(parameters, "average" if averaged else "weights"), grid, besides=True)


def checkpoint_of(source: Path) -> Path:
    """Return a checkpoint, of a run the latest one."""
    return RunDirectory(source).latest() if (source / "checkpoints").is_dir() else source


def metadata_of(source: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises
    ------
    CheckpointError
        If there is none, or it does not say of which model it is.
    """
    metadata = checkpoint.read_manifest(source)["metadata"]
    if "model" not in metadata:
        raise CheckpointError(f"{source} does not say of which model it is: its metadata have no 'model'")
    return metadata


def restore(source: Path, grid: Grid, tensor: str) -> tuple[Any, Pipeline | None, dict[str, Any]]:
    """Return a model with its weights, its pipeline where ``pipe`` cuts it, and what is known of it besides.

    Parameters
    ----------
    source : path
        A run, of which the latest checkpoint is taken, a checkpoint, or a directory of Hugging Face.
    grid : Grid
        Any, whatever it was saved on.
    tensor : str

    Returns
    -------
    model : GPT, Llama, Bert or ViT
    pipeline : Pipeline or None
    table : dict
        Hugging Face's ``config.json`` where the weights have come from there; empty where they were trained here.

    Raises
    ------
    CheckpointError
        If it is none of these, or damaged.
    GridError
        If a directory of Hugging Face is to be cut into stages.
    """
    place = Parallelism(stage_grid(grid), tensor)
    if (source / "config.json").is_file():
        if grid.axes.get(PIPE, 1) > 1:
            raise GridError(f"{source} on {grid}: only a checkpoint is cut into stages; make one with convert --to cm")
        model = models.from_pretrained(source, place)  # which refuses a table that is damaged
        return model, None, json.loads((source / "config.json").read_text(encoding="utf-8"))
    source = checkpoint_of(source)
    metadata = metadata_of(source)
    model = models.from_description(metadata["model"], place)
    pipeline = Pipeline(partition(model, grid), grid) if grid.axes.get(PIPE, 1) > 1 else None
    parameters = model.parameters() if pipeline is None else pipeline.parameters()
    load(source, parameters, grid)
    return model, pipeline, metadata.get("huggingface", {})
