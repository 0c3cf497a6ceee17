"""Functions that read models from Hugging Face directories and write models as such directories.

`from_pretrained` and `save_pretrained` look up the architecture of a model in the registry, pair each parameter with
its tensors, and copy boxes between them: each rank reads the boxes of its own blocks, and rank 0 writes all boxes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossal_mpi import comm
from colossal_mpi.errors import CheckpointError, ConfigError, OptionError
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.models.huggingface.architecture import Architecture, BoxPair, Table, WeightMap, unwrapped
from colossal_mpi.layers.models.huggingface.directory import DTYPES, Reader, Tensors, Writer
from colossal_mpi.layers.models.huggingface.settings import (
    GENERATION,
    SETTINGS,
    find_settings,
    json_object,
    read_settings,
)
from colossal_mpi.layers.models.registry import MODELS, ModelConfig, ModelKind, config_of, construct, kind_of
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.parameter import Parameter
from colossal_mpi.layout import Box, box_shape, slices
from colossal_mpi.platform import backend

MOST = 5 * 10**9
"""Bytes of weights in one file: the limit that transformers had for years."""


@dataclass(frozen=True)
class Origin:
    """The directory that a model was read from, without its weights: what `save_pretrained` writes again.

    Parameters
    ----------
    table : dict
        The contents of ``config.json``.
    settings : mapping of str to bytes
        Tokenizer and generation settings: the contents of files by name, on rank 0 of the grid; empty on other ranks.
    """

    table: Table
    settings: Mapping[str, bytes]


LACKING = {
    "qwen2_moe": "there is no expert that all tokens share",
    "gemma": "there are no norms of gain 1 + w and no scaled embeddings",
    "gemma2": "there are no norms of gain 1 + w, no norms after the branches and no capped scores",
    "gemma3_text": "there are no norms of gain 1 + w and no norms after the branches",
    "phi": "there are no blocks whose attention and MLP share one norm",
    "phi3": "its packed products qkv_proj and gate_up_proj are not mapped",
}
"""What is missing for the directories of each ``model_type`` that is like a llama and cannot be run."""


def from_pretrained(
    directory: str | Path, parallelism: Parallelism, dtype: str | None = None, *, strict: bool = False
) -> Sequential:
    """Return the model that a Hugging Face directory holds: ``config.json`` and one or several safetensors files.

    Parameters
    ----------
    directory : path
        A directory that all ranks can read. Nothing is downloaded.
    parallelism : Parallelism
        The grid and the tensor mode of the model.
    dtype : str, optional
        Dtype of the weights; by default the dtype in the file, or float32 where that has 16 bits.
    strict : bool
        Whether tensors that do not enter the model are refused, such as other heads or adapters. Otherwise they are
        left aside, and rank 0 warns with their names.

    Returns
    -------
    Sequential
        The model that is registered for the ``model_type``: a `GPT`, `Llama`, `Bert` or `ViT`, whose attribute
        ``config`` is the configuration in the file. Its dropout rates and the coefficient of the loss that balances its
        experts are 0, because they belong to training. Its attribute ``origin`` keeps ``config.json``, the tokenizer
        and the generation settings for `save_pretrained`.

    Raises
    ------
    ConfigError
        On all ranks, if the configuration asks for something that no model here computes; the message names key and
        value.
    OptionError
        If `dtype` is no dtype of weights.
    CheckpointError
        If files or tensors are missing, damaged or of another shape, or the package safetensors is not installed; with
        `strict`, if there are further tensors.

    Warns
    -----
    UserWarning
        On rank 0, if tensors are left aside. The masks and indices that older versions stored are none of them.

    Notes
    -----
    Tensors are known by their names in transformers, with or without the prefix of the body, by older names of norms,
    and by names into which torch.compile, DataParallel, FSDP or peft have put parts such as ``_orig_mod.`` and
    ``module.``. A tied tensor may be stored under the name of its copy alone.

    **Communication:** small messages only, for errors. Each rank reads the bytes of its own blocks from disk.

    Examples
    --------
    >>> model = models.from_pretrained("gpt2", Parallelism(Grid(row=2, col=2), "2d"))
    """
    grid = parallelism.grid
    if dtype is not None and dtype not in DTYPES.values():
        raise OptionError(f"from_pretrained with dtype={dtype!r}: use one of {', '.join(map(repr, DTYPES.values()))}")
    with comm.agreed(grid, CheckpointError):
        reader = Reader(directory)
        architecture, kind, config = _read_config(reader, dtype)
        reader.verify(grid.rank, grid.size)
        settings = read_settings(find_settings(reader.directory)) if grid.rank == 0 else {}
    model = construct(kind, config, parallelism)
    pairs = _pair(list(model.parameters()), config.layers, architecture)
    with comm.agreed(grid, CheckpointError):
        surplus = _read_weights(reader, pairs, architecture, strict)
    vars(model)["origin"] = Origin(reader.config, settings)
    if surplus and grid.rank == 0:
        adapters = any("lora_" in name for name in surplus)
        remedy = " (adapters are not added to the weights: merge them with peft before)" if adapters else ""
        warnings.warn(
            f"{directory}: {len(surplus)} tensors do not enter the {type(model).__name__} and are left aside{remedy}: "
            f"{_listed(surplus)}; strict=True (--strict) refuses them",
            stacklevel=2,
        )
    return model


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_config(reader: Reader, dtype: str | None) -> tuple[Architecture, ModelKind, ModelConfig]:
    """Return the architecture, the kind and the configuration of the model in a directory."""
    path, wanted = reader.directory / "config.json", reader.config.get("model_type")
    for kind in MODELS.values():
        for architecture in kind.huggingface:
            if wanted == architecture.model_type:
                try:
                    values = architecture.read_config(reader.config, set(map(unwrapped, reader)))
                except ConfigError as problem:
                    raise ConfigError(f"{path}: {problem}") from None
                # The widest dtype of the weights, and float32 at least: a CPU computes slowly with 16 bits.
                widest = "float64" if any(reader.code(name) == "F64" for name in reader) else "float32"
                return architecture, kind, kind.config(**values, seed=None, dtype=dtype or widest)
    lacks = f" ({LACKING[wanted]})" if isinstance(wanted, str) and wanted in LACKING else ""
    known = sorted(architecture.model_type for kind in MODELS.values() for architecture in kind.huggingface)
    raise ConfigError(f"{path}: model_type={wanted!r} cannot be run{lacks}: it must be one of {', '.join(known)}")


Pairs = list[tuple[Parameter, WeightMap]]


def _pair(parameters: Sequence[Parameter], layers: int, architecture: Architecture) -> Pairs:
    """Return each parameter with the map of its name and number of dims."""
    maps = {(weight.ours, len(weight.letters)): weight for weight in architecture.weights_of(layers)}
    keys = [(parameter.name, parameter.value.ndim) for parameter in parameters]
    homeless = [name for name, ndim in keys if (name, ndim) not in maps]
    if homeless:
        raise CheckpointError(f"a {architecture.model_type} of Hugging Face has no place for {', '.join(homeless[:3])}")
    return [(parameter, maps[key]) for parameter, key in zip(parameters, keys, strict=True)]


def _read_weights(reader: Reader, pairs: Pairs, architecture: Architecture, strict: bool) -> list[str]:
    """Fill the parameters, and return the names of the tensors that enter none of them.

    Each rank reads the bytes of its own blocks and the headers of the files. Missing tensors, other shapes and, with
    `strict`, tensors without a parameter raise CheckpointError before any parameter changes; tied tensors that differ
    raise it afterwards.
    """
    names, copies, surplus = _names_in_directory(reader, pairs, architecture)
    if strict and surplus:
        raise CheckpointError(
            f"{reader.directory} holds more than its model: it has {_listed(surplus)} besides; strict=False "
            "(no --strict) leaves such tensors aside"
        )
    for parameter, weight in pairs:
        value = parameter.value
        block = np.empty(box_shape(value.box), backend.numpy_dtype(value.dtype))
        for pair in weight.box_pairs(value.shape, value.box):
            values = reader.read(names[pair.name], pair.theirs)
            if pair.name in copies:
                _require_equal_copy(reader, copies[pair.name], pair, values)
            block[slices(pair.ours, value.box)] = pair.from_theirs(values)
        value.local[...] = backend.to_block(block, value.local)
    return surplus


def _require_equal_copy(reader: Reader, copy: str, pair: BoxPair, values: np.ndarray) -> None:
    """Raise CheckpointError if the directory stores a tied tensor a second time with other values."""
    if not np.array_equal(reader.read(copy, pair.theirs), values):
        raise CheckpointError(
            f"{reader.directory}: {copy} is not {pair.name}, to which tie_word_embeddings ties it: if it is meant "
            "to be another, make that false in config.json"
        )


def _names_in_directory(
    reader: Reader, pairs: Pairs, architecture: Architecture
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return the names in the directory of the tensors that are needed, of their tied copies, and of the others.

    Missing tensors and other shapes raise CheckpointError.
    """
    stored: dict[str, list[str]] = {}
    for name in sorted(reader, key=len):  # a name that no wrapper has lengthened comes first
        stored.setdefault(unwrapped(name), []).append(name)
    needed = [theirs for parameter, weight in pairs for theirs in weight.names(parameter.value.shape)]
    tied = {name: copy for name, copy in architecture.tied.items() if copy not in needed}
    names, copies, missing = {}, {}, []
    for name in needed:
        known = [n for spelling in architecture.spellings(name) for n in stored.get(spelling, [])]
        twins = stored.get(tied.get(name, ""), [])
        if known and twins:
            copies[name] = twins[0]
        twins = twins or stored.get(architecture.doubled.get(name, ""), [])
        if known or twins:
            names[name] = (known or twins)[0]
        else:
            missing.append(name)
    used = set(names.values())
    surplus = [name for name in reader if name not in used and not architecture.is_ignored(unwrapped(name))]
    if missing:
        raise CheckpointError(
            f"{reader.directory} does not hold the {architecture.model_type} of its configuration: it lacks "
            f"{_listed(missing)} and has {_listed(surplus) or 'nothing'} besides"
        )
    for parameter, weight in pairs:
        shape = weight.shape(parameter.value.shape)
        for name in (names[theirs] for theirs in weight.names(parameter.value.shape)):
            if reader.shape(name) != shape:
                raise CheckpointError(
                    f"{reader.directory}: {name} is of shape {reader.shape(name)}; its configuration makes it {shape}"
                )
            reader.dtype(name)
    return names, copies, surplus


def save_pretrained(
    model: Layer,
    directory: str | Path,
    *,
    most: int = MOST,
    extra: Mapping[str, Any] | None = None,
    settings: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model as a directory that transformers can load, in the dtype of its weights.

    A model that `from_pretrained` has read keeps its tokenizer, its generation settings and the keys of ``config.json``
    that do not say what is computed, such as the tokens that end a text.

    Parameters
    ----------
    model : Layer
        A `GPT`, `Llama`, `Bert` or `ViT`, or another registered model with an architecture of Hugging Face, on any
        grid and in any mode.
    directory : path
        It must not exist, or be empty. Only rank 0 of the grid writes to it.
    most : int
        Bytes of weights in one file; a larger model goes into several files with an index.
    extra : mapping, optional
        Further keys of ``config.json``, such as ``eos_token_id``; they never replace keys that say what is computed.
        Where several values of ``model_type`` fit the model (llama and mistral), the one in `extra` is written, and
        else the first that has a place for the whole configuration.
        Token ids that differ from those of the directory the model was read from, such as another ``eos_token_id``,
        are written into ``generation_config.json``, too.
    settings : mapping of str to bytes, optional
        Contents of tokenizer and generation settings by the names of their files, on rank 0; by default those of the
        directory that the model was read from.

    Raises
    ------
    CheckpointError
        On all ranks, if the model has no architecture of transformers, the directory is not empty, or it cannot be
        written. Nothing is left under its name then.
    ConfigError
        If transformers cannot run what the configuration asks for.

    Notes
    -----
    **Communication:** a gather to rank 0, which receives every element that it does not hold, once, in messages of at
    most 32 MiB of float64, and holds no more than one message at a time. A tied weight is written once.
    """
    kind = kind_of(model)
    fitting = kind.huggingface if kind else ()
    if not fitting:
        raise CheckpointError(f"a {type(model).__name__} is no model of transformers: colossal_mpi.checkpoint saves it")
    config = config_of(model)
    origin = vars(model).get("origin", Origin({}, {}))
    changed = {key: value for key, value in (extra or {}).items() if value != origin.table.get(key)}
    extra = origin.table | dict(extra or {})
    architecture = _choose(fitting, config, extra.get("model_type"))
    parameters = list(model.parameters())
    grid, dtype = parameters[0].value.grid, backend.numpy_dtype(parameters[0].value.dtype).name
    # transformers renamed the key; older versions read torch_dtype.
    table = architecture.write_config(config, extra) | {"dtype": dtype, "torch_dtype": dtype}
    pairs, writer = _pair(parameters, config.layers, architecture), None
    with comm.agreed(grid, CheckpointError):
        if grid.rank == 0:
            files = _with_ids(origin.settings, changed) if settings is None else settings
            _require_settings(files)
            writer = Writer(directory, table, _tensors(pairs, architecture.doubled), most, files)
    # value[layout] -> rank 0, box by box: gather to the root
    failures = [
        parameter.value.gather_pieces(_box_writer(writer, parameter, weight, architecture.doubled))
        for parameter, weight in pairs
    ]
    with comm.agreed(grid, CheckpointError):
        if writer is not None:
            writer.close(next((failure for failure in failures if failure is not None), None))


def _with_ids(settings: Mapping[str, bytes], changed: Mapping[str, Any]) -> Mapping[str, bytes]:
    """Return the settings with the changed token ids in ``generation_config.json``."""
    ids = {key: value for key, value in changed.items() if key.endswith("_token_id")}
    if not ids or GENERATION not in settings:
        return settings
    table = json_object(GENERATION, settings[GENERATION]) | ids
    return {**settings, GENERATION: (json.dumps(table, indent=2) + "\n").encode()}


def _require_settings(settings: Mapping[str, bytes]) -> None:
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise CheckpointError(f"save_pretrained with settings {unknown[0]!r}: the names are {', '.join(SETTINGS)}")


def _choose(fitting: Sequence[Architecture], config: ModelConfig, wanted: object) -> Architecture:
    """Return the architecture of the wanted ``model_type``, else the first that has a place for a configuration."""
    named = [architecture for architecture in fitting if architecture.model_type == wanted]
    for architecture in named or fitting:
        try:
            architecture.write_config(config)
        except ConfigError:
            continue
        return architecture
    return (named or list(fitting))[0]  # whose message says what it lacks


def _tensors(pairs: Pairs, doubled: Mapping[str, str]) -> Tensors:
    """Return shape and dtype of every tensor that stores the parameters."""
    return {
        name: (weight.shape(parameter.value.shape), backend.numpy_dtype(parameter.value.dtype))
        for parameter, weight in pairs
        for theirs in weight.names(parameter.value.shape)
        for name in _names_of(theirs, doubled)
    }


def _names_of(name: str, doubled: Mapping[str, str]) -> list[str]:
    """Return the names under which a tensor is written."""
    return [name, doubled[name]] if name in doubled else [name]


def _box_writer(
    writer: Writer | None, parameter: Parameter, weight: WeightMap, doubled: Mapping[str, str]
) -> Callable[[Box, np.ndarray], None]:
    """Return the function that rank 0 calls with every box of a parameter."""

    def write(box: Box, values: np.ndarray) -> None:
        assert writer is not None
        for pair in weight.box_pairs(parameter.value.shape, box):
            for name in _names_of(pair.name, doubled):
                writer.write(name, pair.theirs, pair.to_theirs(values[slices(pair.ours, box)]))

    return write
