"""Models that runs and conversions have saved: the weights of a checkpoint, and the model that they belong to.

The commands ``generate`` and ``convert`` call it. It reads checkpoints with ``checkpoint`` and makes models with
``layers.models``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from colossal_mpi import checkpoint
from colossal_mpi.apps.config import load_plugins
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, GridError
from colossal_mpi.grid import Grid
from colossal_mpi.layers import Layer, Parallelism, Parameter, Sequential, add_adapters, models
from colossal_mpi.layers.pipeline import PIPE, Pipeline, partition, stage_grid


def weights_by_name(parameters: Iterable[Parameter], kind: str = "weights") -> dict[str, DistArray]:
    """Return the weights of a model by the names that checkpoints give them.

    Parameters
    ----------
    parameters : iterable of Parameter
        The parameters of the model.
    kind : {"weights", "average"}
        First part of the names, for weights or for their moving averages.

    Returns
    -------
    dict of str to DistArray
        The weights themselves, not copies.
    """
    return {f"{kind}/{p.name}": p.value for p in parameters}


def load_weights(source: Path, parameters: Iterable[Parameter], grid: Grid) -> None:
    """Fill the weights of a model from a checkpoint: with their moving averages, if the run kept them.

    Parameters
    ----------
    source : Path
        The checkpoint.
    parameters : iterable of Parameter
        The parameters of the model, on any grid and in any mode.
    grid : Grid
        All ranks that read.

    Raises
    ------
    CheckpointError
        If the checkpoint lacks a weight or is damaged, on all ranks.

    Notes
    -----
    **Communication:** messages of a few bytes; each rank reads its own blocks.
    """
    values = {p.name: p.value for p in parameters}
    names = saved_names(source, values)
    checkpoint.load(source, {names[name]: value for name, value in values.items()}, grid, besides=True)


def saved_names(source: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the names in a checkpoint of the values that a model is used with.

    Parameters
    ----------
    source : Path
        The checkpoint.
    names : iterable of str
        The names of parameters.

    Returns
    -------
    dict of str to str
        By parameter, the name of its moving average, or of its weight where the run kept none, as of frozen weights.
    """
    arrays = checkpoint.read_manifest(source)["arrays"]
    return {name: f"average/{name}" if f"average/{name}" in arrays else f"weights/{name}" for name in names}


def model_of(metadata: dict[str, Any], parallelism: Parallelism) -> Sequential:
    """Return the model that a checkpoint describes, with its adapters, and zeros for weights that are to be loaded.

    Parameters
    ----------
    metadata : dict
        What `metadata_of` returned.
    parallelism : Parallelism
        The grid and the tensor mode of the model.

    Returns
    -------
    Sequential
        The model, whose weights are frozen if it has adapters.

    Raises
    ------
    CheckpointError
        If the metadata describe no adapters.
    """
    model = models.from_description(metadata["model"], parallelism)
    if saved := metadata.get("adapter"):
        try:
            add_adapters(model, int(saved["rank"]), float(saved["alpha"]), list(saved["targets"]), None)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"adapter={saved!r} must have rank, alpha and targets") from None
    return model


def checkpoint_of(source: Path) -> Path:
    """Return the checkpoint that a user names.

    Parameters
    ----------
    source : Path
        A checkpoint or a run directory.

    Returns
    -------
    Path
        The checkpoint itself, or the latest one of the run.

    Raises
    ------
    CheckpointError
        If the run has no checkpoint.
    """
    return RunDirectory(source).latest() if (source / "checkpoints").is_dir() else source


def settings_of(source: Path) -> dict[str, Path]:
    """Return the tokenizer and the generation settings that belong to a model.

    Parameters
    ----------
    source : Path
        A run, a checkpoint, or a Hugging Face directory.

    Returns
    -------
    dict of str to Path
        The files by name. The checkpoint of a run has the tokenizer of the run.

    Raises
    ------
    CheckpointError
        If the run has no checkpoint.
    """
    folder = checkpoint_of(source).absolute()
    runs = [folder.parent.parent] if folder.parent.name == "checkpoints" else []
    return models.find_settings(source, folder, *runs)


def metadata_of(source: Path, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """Return the metadata of a checkpoint, once the plugins of its run are loaded.

    Parameters
    ----------
    source : Path
        The checkpoint.
    plugins : sequence of str
        Files or modules to load in place of the plugins that the run had.

    Returns
    -------
    dict
        ``model``, a description for `colossal_mpi.layers.models.from_description`, and what else was saved.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it does not say which model it holds.
    ConfigError
        If a plugin cannot be loaded.
    """
    metadata: dict[str, Any] = checkpoint.read_manifest(source)["metadata"]
    if "model" not in metadata:
        raise CheckpointError(f"{source} does not say of which model it is: its metadata have no 'model'")
    table: Any = metadata
    for key in ("config", "run", "plugins"):
        table = table.get(key) if isinstance(table, dict) else None
    load_plugins(plugins or [one for one in table or [] if isinstance(one, str)])
    return metadata


def load_model(
    source: Path, grid: Grid, tensor: str, plugins: Sequence[str] = (), strict: bool = False
) -> tuple[Layer, Pipeline | None, dict[str, Any]]:
    """Return a model with its weights, and its pipeline if the grid has an axis ``pipe``.

    Parameters
    ----------
    source : Path
        A run, of which the latest checkpoint is taken, a checkpoint, or a Hugging Face directory.
    grid : Grid
        Any grid, whatever the model was saved on.
    tensor : str
        A tensor mode of `colossal_mpi.layers.MODES`.
    plugins : sequence of str
        Files or modules to load in place of the plugins that the run had.
    strict : bool
        Whether tensors of a Hugging Face directory that do not enter the model are refused.

    Returns
    -------
    model : Layer
        A model of a registered kind.
    pipeline : Pipeline or None
        The stages of the model where ``pipe`` cuts it.
    table : dict
        Hugging Face's ``config.json`` where the weights come from there; empty where they were trained here.

    Raises
    ------
    CheckpointError
        If the source is none of these, or damaged.
    GridError
        If a Hugging Face directory is to be cut into stages.

    Notes
    -----
    **Communication:** messages of a few bytes; each rank reads its own blocks.
    """
    parallelism = Parallelism(stage_grid(grid), tensor)
    if (source / "config.json").is_file():
        if grid.axes.get(PIPE, 1) > 1:
            raise GridError(f"{source} on {grid}: only a checkpoint is cut into stages; make one with convert --to cm")
        model = models.from_pretrained(source, parallelism, strict=strict)  # it refuses a damaged table
        return model, None, vars(model)["origin"].table
    source = checkpoint_of(source)
    metadata = metadata_of(source, plugins)
    model = model_of(metadata, parallelism)
    pipeline = Pipeline(partition(model, grid), grid) if grid.axes.get(PIPE, 1) > 1 else None
    parameters = model.parameters() if pipeline is None else pipeline.parameters()
    load_weights(source, parameters, grid)
    return model, pipeline, metadata.get("huggingface", {})
