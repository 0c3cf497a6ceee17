"""Models from Hugging Face directories and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colossal_mpi import comm
from colossal_mpi.errors import CheckpointError, ConfigError, OptionError
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.models.huggingface import weights
from colossal_mpi.layers.models.huggingface.architecture import Architecture
from colossal_mpi.layers.models.huggingface.bert import BERT
from colossal_mpi.layers.models.huggingface.gpt2 import GPT2
from colossal_mpi.layers.models.huggingface.llama import LLAMA, MISTRAL
from colossal_mpi.layers.models.huggingface.sink import Sink
from colossal_mpi.layers.models.huggingface.source import DTYPES, Source
from colossal_mpi.layers.models.huggingface.vit import VIT
from colossal_mpi.layers.models.kinds import KINDS
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.platform import backend

KNOWN: tuple[tuple[Architecture, str], ...] = (
    (GPT2, "gpt"),
    (LLAMA, "llama"),
    (MISTRAL, "llama"),
    (BERT, "bert"),
    (VIT, "vit"),
)
"""Each architecture and the kind of its model here."""

MOST = 5 * 10**9
"""Bytes of weights in one file, as transformers has had it."""


def from_pretrained(directory: str | Path, parallelism: Parallelism, dtype: str | None = None) -> Any:
    """Return the model of a Hugging Face directory: ``config.json`` and one or several safetensors.

    Parameters
    ----------
    directory : path
        That all ranks see. Nothing is downloaded.
    parallelism : Parallelism
        On any grid, in any mode.
    dtype : str, optional
        Of the weights; by default that of the file, or float32 where it is of 16 bits.

    Returns
    -------
    GPT, Llama, Bert or ViT
        By the ``model_type``, with the configuration that the file gives as ``config``. It has no dropout: rates are no
        part of what was trained.

    Raises
    ------
    ConfigError
        On all ranks, if the configuration asks for what no model here computes, by key and value.
    OptionError
        If `dtype` is none of weights.
    CheckpointError
        If files or tensors are missing, damaged or of another shape, or the package safetensors is not installed.

    Notes
    -----
    **Communication:** small messages only. Each rank reads the bytes of its own blocks.

    Examples
    --------
    >>> model = models.from_pretrained("gpt2", Parallelism(Grid(row=2, col=2), "2d"))
    """
    grid = parallelism.grid
    if dtype is not None and dtype not in DTYPES.values():
        raise OptionError(f"from_pretrained with dtype={dtype!r}: use one of {', '.join(map(repr, DTYPES.values()))}")
    with comm.agreed(grid, CheckpointError):
        source = Source(directory)
        architecture, kind, config = _config(source, dtype)
    model = kind(config, parallelism)
    pairs = weights.pair(list(model.parameters()), config.layers, architecture)
    with comm.agreed(grid, CheckpointError):
        weights.read(source, pairs, architecture)
    return model


def _config(source: Source, dtype: str | None) -> tuple[Architecture, type, Any]:
    """Return the architecture of a directory, its model and its configuration."""
    path, name = source.directory / "config.json", source.config.get("model_type")
    for architecture, kind in KNOWN:
        if name == architecture.name:
            model, config = KINDS[kind]
            try:
                fields = architecture.fields(source.config)
            except ConfigError as problem:
                raise ConfigError(f"{path}: {problem}") from None
            return architecture, model, config(**fields, seed=None, dtype=dtype or _dtype(source))
    known = ", ".join(architecture.name for architecture, _ in KNOWN)
    raise ConfigError(f"{path}: model_type={name!r} cannot be run: it must be one of {known}")


def _dtype(source: Source) -> str:
    """Return the widest dtype of the weights, float32 at least: a CPU has no use for 16 bits."""
    return "float64" if any(source.code(name) == "F64" for name in source) else "float32"


def save_pretrained(
    model: Layer, directory: str | Path, *, most: int = MOST, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model as a directory that transformers loads, in the dtype that it has.

    Parameters
    ----------
    model : GPT, Llama, Bert or ViT
        On any grid, in any mode.
    directory : path
        Must not exist, or be empty. Only rank 0 of the grid must see it.
    most : int
        Bytes of weights in one file; more go into several, with an index.
    extra : mapping, optional
        Further keys of ``config.json``, such as ``eos_token_id``; those that say what is computed are the model's own.
        Of several kinds of ``model_type`` for one architecture, such as llama and mistral, the one here is written.

    Raises
    ------
    CheckpointError
        On all ranks, if the model is of no architecture of transformers, the directory holds something, or it cannot be
        written; nothing is left under its name then.

    Notes
    -----
    **Communication:** rank 0 receives every element that it does not hold, once, in pieces of at most 32 MiB of
    float64, and holds no more than one at a time. A weight that is tied is written once.
    """
    fitting = {known.name: known for known, kind in KNOWN if type(model) is KINDS[kind][0]}
    if not fitting:
        raise CheckpointError(f"a {type(model).__name__} is no model of transformers: colossal_mpi.checkpoint saves it")
    if getattr(model.config, "experts", 0):  # type: ignore[attr-defined]
        raise CheckpointError("a mixture of experts is no model of transformers here: colossal_mpi.checkpoint saves it")
    architecture = fitting.get(str((extra or {}).get("model_type")), next(iter(fitting.values())))
    parameters = list(model.parameters())
    config, grid = model.config, parameters[0].value.grid  # type: ignore[attr-defined]
    table, sink = architecture.table(config, extra) | _dtypes(parameters[0].value.dtype), None
    pairs = weights.pair(parameters, config.layers, architecture)
    with comm.agreed(grid, CheckpointError):
        if grid.rank == 0:
            sink = Sink(directory, table, weights.tensors(pairs), most)
    failure = weights.write(sink, pairs)
    with comm.agreed(grid, CheckpointError):
        if sink is not None:
            sink.close(failure)


def _dtypes(dtype: Any) -> dict[str, str]:
    """Return the key of the dtype in the spelling of today and in that of older versions."""
    name = backend.numpy_dtype(dtype).name
    return {"dtype": name, "torch_dtype": name}
