"""``colossal-mpi convert``: convert weights between Hugging Face directories and HDF5 checkpoints.

`convert` builds the model on all ranks, each with a part of every matrix, loads it in one format and saves it in the
other one. The tokenizer and the generation settings travel with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from colossal_mpi import checkpoint, comm
from colossal_mpi.apps import training
from colossal_mpi.apps.command import Command, Plugins
from colossal_mpi.errors import CheckpointError, OptionError
from colossal_mpi.grid import Grid, world_size
from colossal_mpi.layers import Parallelism, merge_adapters, models


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert weights between Hugging Face directories and checkpoints, bit for bit.

    Any number of ranks can take part.
    """

    example = "mpiexec -n 4 colossal-mpi convert gpt2 gpt2.cm --to cm"

    source: Annotated[Path, typer.Argument(help="A Hugging Face directory, a checkpoint or a run.")]
    target: Annotated[Path, typer.Argument(help="The directory to write; it must not exist.")]
    to: Annotated[str, typer.Option(help="hf: config.json and safetensors. cm: an HDF5 checkpoint.")]
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapters of a run to its weights.")] = False
    most: Annotated[int, typer.Option(min=1, help="Bytes of weights in one safetensors file, at most.")] = 5 * 10**9
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse tensors of a Hugging Face directory that are not the model's."),
    ] = False
    plugin: Plugins = field(default_factory=list)

    def run(self) -> int:
        convert(self.source, self.target, self.to, self.most, self.plugin, self.strict, merged=self.merge)
        return 0


def convert(
    source: Path,
    target: Path,
    to: str,
    most: int,
    plugins: Sequence[str] = (),
    strict: bool = False,
    *,
    merged: bool = False,
) -> None:
    """Read weights in one format and write them in the other one, with tokenizer and generation settings.

    Parameters
    ----------
    source : Path
        The directory to read.
    target : Path
        The directory to write.
    to : {"hf", "cm"}
        "hf" reads a checkpoint, or the latest one of a run; "cm" reads a Hugging Face directory.
    most : int
        Bytes of weights in one safetensors file, at most.
    plugins : sequence of str
        Files or modules to load in place of the plugins that the run had.
    strict : bool
        Whether tensors of a Hugging Face directory that do not enter the model are refused. Otherwise they are left
        aside, and rank 0 warns with their names.
    merged : bool
        Whether to add the adapters of a run to its weights.

    Raises
    ------
    OptionError
        If there is no such format.
    CheckpointError
        If `source` does not hold what `to` reads, or has adapters that are not to be merged, or `target` cannot be
        written; with `strict`, if it holds more.
    """
    parallelism = Parallelism(Grid(col=world_size()), "1d")
    if to == "cm":
        _to_checkpoint(source, target, parallelism, strict)
    elif to == "hf":
        _to_hugging_face(source, target, parallelism, most, plugins, merged)
    else:
        raise OptionError(f"convert --to {to!r}: use 'hf' or 'cm'")


def _to_checkpoint(source: Path, target: Path, parallelism: Parallelism, strict: bool) -> None:
    model = models.from_pretrained(source, parallelism, strict=strict)
    metadata = {"model": models.describe(model), "huggingface": vars(model)["origin"].table}
    files = _settings(source, parallelism.grid)
    checkpoint.save(target, training.weights_by_name(model.parameters()), metadata, parallelism.grid, files=files)


def _settings(source: Path, grid: Grid) -> dict[str, bytes]:
    """Return the tokenizer and the generation settings of a model on rank 0, nothing on other ranks."""
    with comm.agreed(grid, CheckpointError):
        return models.read_settings(training.settings_of(source)) if grid.rank == 0 else {}


def _to_hugging_face(
    source: Path, target: Path, parallelism: Parallelism, most: int, plugins: Sequence[str], merged: bool
) -> None:
    settings = _settings(source, parallelism.grid)
    source = training.checkpoint_of(source)
    metadata = training.metadata_of(source, plugins)
    if metadata.get("adapter") and not merged:
        raise CheckpointError(f"{source} has adapters, for which config.json has no place: give --merge")
    model = training.model_of(metadata, parallelism)
    training.load_weights(source, model.parameters(), parallelism.grid)
    merge_adapters(model)
    models.save_pretrained(model, target, most=most, extra=metadata.get("huggingface"), settings=settings)
