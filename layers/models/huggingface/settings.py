"""The files of a Hugging Face directory beside ``config.json`` and the weights: tokenizer and generation settings.

`from_pretrained` and `save_pretrained` carry them along unread, and so does ``colossal-mpi convert``;
``colossal-mpi generate`` takes the tokens that end a text from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colossal_mpi import files
from colossal_mpi.errors import CheckpointError

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
SETTINGS = (
    GENERATION,
    TOKENIZER,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""The names of the files that say how text or images become input, and how text is generated."""


def find_settings(*directories: Path) -> dict[str, Path]:
    """Return the files of settings that some directories hold.

    Parameters
    ----------
    *directories : Path
        Directories that all ranks can read; the first one that has a file counts.

    Returns
    -------
    dict of str to Path
        The paths by the names of `SETTINGS`.
    """
    paths = {name: [folder / name for folder in directories if (folder / name).is_file()] for name in SETTINGS}
    return {name: found[0] for name, found in paths.items() if found}


def read_settings(paths: Mapping[str, Path]) -> dict[str, bytes]:
    """Return the contents of files of settings.

    Parameters
    ----------
    paths : mapping of str to Path
        The files by name.

    Returns
    -------
    dict of str to bytes
        Their contents by name.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    """
    try:
        return {name: files.read_bytes(path) for name, path in paths.items()}
    except OSError as problem:
        raise CheckpointError(f"{problem.filename} cannot be read: {problem.strerror}") from None


def json_object(path: str | Path, content: bytes) -> dict[str, Any]:
    """Return the table that a JSON file holds; raise CheckpointError, with the path, if it holds none."""
    try:
        table = files.parse_json(content)
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is damaged: it is no JSON object")
    return table


def end_tokens(table: Mapping[str, Any], settings: Mapping[str, Path]) -> list[int]:
    """Return the tokens that end a text.

    Parameters
    ----------
    table : mapping
        The contents of ``config.json``.
    settings : mapping of str to Path
        Files of settings by name, as `find_settings` returns them.

    Returns
    -------
    list of int
        The ``eos_token_id`` of ``generation_config.json`` or, if it gives none, that of ``config.json``. The list is
        empty if neither gives one.

    Raises
    ------
    CheckpointError
        If the ids are not integers, or the file is damaged.
    """
    given, where = table.get("eos_token_id"), "config.json"
    if GENERATION in settings:
        content = read_settings({GENERATION: settings[GENERATION]})[GENERATION]
        generation = json_object(settings[GENERATION], content)
        if generation.get("eos_token_id") is not None:
            given, where = generation["eos_token_id"], str(settings[GENERATION])
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(token) is not int for token in tokens):
        raise CheckpointError(f"{where}: eos_token_id={given!r} must be an integer or a list of integers")
    return tokens
