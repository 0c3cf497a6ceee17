"""Configurations as TOML: load a file with settings over it, validate it, and write it with a comment for each key.

All commands that run a model call `load`. It loads the plugins, validates the sections of ``sections`` and refuses the
combinations of keys that ``combinations`` finds; each error names the key, its value, the file and what would work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, cast, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from colossal_mpi import files
from colossal_mpi.apps.config.combinations import problems
from colossal_mpi.apps.config.plugins import load_plugins
from colossal_mpi.apps.config.sections import Choice, Config, model_sections
from colossal_mpi.errors import ConfigError

_WIDTH = 110
SHIPPED = Path(__file__).parents[1] / "configs"


def shipped() -> str:
    """Return the names of the configurations that come with the package.

    Returns
    -------
    str
        The names in order, with commas between.
    """
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def load(source: str, settings: Sequence[str] = ()) -> Config:
    """Return the validated configuration of a TOML file, with settings put over it.

    Parameters
    ----------
    source : str
        A path, or the name of a shipped configuration such as ``demo``.
    settings : sequence of str
        Each is ``section.key=value``. The value is TOML, or a string if it is not valid TOML.

    Returns
    -------
    Config
        The configuration, every key with its value.

    Raises
    ------
    ConfigError
        One message that names every key at fault, its value, the file and what would work.

    Examples
    --------
    >>> load("demo", ["training.steps=50"]).training.steps
    50
    """
    path = Path(source) if Path(source).suffix else SHIPPED / f"{source}.toml"
    try:
        table = files.parse_toml(files.read_bytes(path, files.LARGEST_CONFIG).decode())
    except OSError as problem:
        raise ConfigError(
            f"cannot read config {source}: {problem.strerror}; give a file or one of: {shipped()}"
        ) from None
    except ValueError as problem:
        raise ConfigError(f"{path} is not valid TOML: {problem}") from None
    for setting in settings:
        _put(table, setting)
    return validate(table, str(path))


def _put(table: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections:
        raise ConfigError(f"--set {setting!r}: write section.key=value, for example training.steps=100")
    try:
        (value,) = files.parse_toml(f"value = {text}").values()
    except ValueError as problem:  # no TOML, or more than one value
        if "nested" in str(problem):
            raise ConfigError(f"--set {name}: {problem}") from None
        value = text
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting!r}: {section} is a value, not a section")
    table[key] = value


def validate(table: Mapping[str, Any], source: str) -> Config:
    """Return the configuration that a table describes, once its plugins are loaded.

    Parameters
    ----------
    table : mapping of str to object
        Sections by name, each a mapping of its keys, as TOML has them.
    source : str
        The name that error messages give the table, for example its file.

    Returns
    -------
    Config
        The configuration, every key with its value.

    Raises
    ------
    ConfigError
        One message that names every key at fault, its value, the source and what would work.
    """
    _load_plugins(table.get("run"))
    try:
        config = Config.model_validate(table)
        lines = problems(config)
    except ValidationError as problem:
        lines = [_explain(error, table) for error in problem.errors()]
    if lines:
        raise ConfigError(f"{source}: " + "; ".join(lines))
    return config


def _load_plugins(run: object) -> None:
    """Load the plugins of a section ``run`` that is not validated yet; its validation refuses what is malformed."""
    plugins = run.get("plugins") if isinstance(run, Mapping) else None
    if isinstance(plugins, list):
        load_plugins(plugin for plugin in plugins if isinstance(plugin, str))


def _explain(error: ErrorDetails, table: Mapping[str, Any]) -> str:
    place = [str(part) for part in error["loc"]]
    key = ".".join(place)
    if error["type"] == "extra_forbidden":
        *sections, _ = place
        kind = table["model"].get("kind", "gpt") if sections == ["model"] else None
        where = f"here (kind={kind!r})" if kind else "here"
        return f"unknown key {key}={error['input']!r}; known {where} are {', '.join(_known(sections, kind))}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known(sections: Sequence[str], kind: str | None) -> list[str]:
    """Return the keys of a section, given its path and, for the section ``model``, the kind of model."""
    section: type[BaseModel] = Config
    for name in sections:
        section = model_sections()[kind] if kind else cast("type[BaseModel]", section.model_fields[name].annotation)
    return list(section.model_fields)


def choices(key: str) -> tuple[str, ...]:
    """Return the values that a key may have, for the help of a command line.

    Parameters
    ----------
    key : str
        Section and key, for example ``parallel.tensor``, or ``model.kind``.

    Returns
    -------
    tuple of str
        The names in the key's registry, plugins included, or the alternatives of the schema; empty where any value of
        the key's type will do.

    Examples
    --------
    >>> choices("parallel.recompute")
    ('none', 'selective', 'full')
    """
    if key == "model.kind":
        return tuple(model_sections())
    name, _, field = key.partition(".")
    section = cast("type[BaseModel]", Config.model_fields[name].annotation)
    return _choices(section.model_fields[field])


def _choices(field: FieldInfo) -> tuple[str, ...]:
    for mark in field.metadata:
        if isinstance(mark, Choice):
            return tuple(mark.names())
    return tuple(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else ()


def parse_grid(text: str) -> dict[str, int]:
    """Return the axes of a grid from their form on a command line.

    Parameters
    ----------
    text : str
        Axes and sizes, outermost first, for example ``data=2,row=2,col=2``.

    Returns
    -------
    dict of str to int
        The size of each axis.

    Raises
    ------
    ConfigError
        If the text is not of that form.
    """
    axes: dict[str, int] = {}
    for piece in text.split(","):
        axis, equals, size = piece.partition("=")
        if not equals or not size.strip().isdecimal() or not axis.strip().isidentifier() or axis.strip() in axes:
            raise ConfigError(f"--grid {text!r}: write axis=size with commas between, for example data=2,row=2,col=2")
        axes[axis.strip()] = int(size)
    return axes


def grid_setting(axes: Mapping[str, int]) -> str:
    """Return the setting that gives a run a grid, for `load`.

    Parameters
    ----------
    axes : mapping of str to int
        The size of each axis, outermost first.

    Returns
    -------
    str
        ``parallel.grid={ axis = size, ... }``.
    """
    return f"parallel.grid={{ {', '.join(f'{axis} = {size}' for axis, size in axes.items())} }}"


def setting(key: str, value: str | Sequence[str]) -> str:
    """Return the setting that gives a key a text or texts of any characters, for `load`.

    Parameters
    ----------
    key : str
        Section and key, for example ``parallel.tensor`` or ``run.plugins``.
    value : str or sequence of str
        The value of the key.

    Returns
    -------
    str
        ``section.key=value``, the value as TOML.

    Examples
    --------
    >>> setting("run.plugins", ["mine.py"])
    'run.plugins=["mine.py"]'
    """
    return f"{key}={_inline(value)}"


def dump(config: Config) -> str:
    """Return a configuration as TOML.

    Parameters
    ----------
    config : Config
        Any configuration.

    Returns
    -------
    str
        The text of a file that `load` takes.
    """
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def commented(config: Config) -> str:
    """Return a configuration as TOML with a comment on each key, for a reader.

    Parameters
    ----------
    config : Config
        Any configuration.

    Returns
    -------
    str
        The text of a file that `load` takes.
    """
    lines = [
        "# Every key of this run. Give the file to `colossal-mpi train`, or single keys with --set section.key=value."
    ]
    for name in Config.model_fields:
        section = getattr(config, name)
        lines += ["", f"[{name}]  # {(section.__doc__ or '').splitlines()[0]}"]
        for key, field in type(section).model_fields.items():
            value = getattr(section, key)
            line = f"{key} = {_inline(value)}" if value is not None else f"# {key} is not set"  # TOML has no null
            lines += _with_comment(line, _meaning(field))
    return "\n".join(lines) + "\n"


def _with_comment(line: str, meaning: str) -> list[str]:
    """Return a key with its comment beside it, or above it where that would be too wide."""
    beside = f"{line}  # {meaning}" if meaning else line
    return [beside] if len(beside) <= _WIDTH else [*(f"# {part}" for part in wrap(meaning, _WIDTH - 2)), line]


def _inline(value: object) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _meaning(field: FieldInfo) -> str:
    names = _choices(field)
    options = [f"one of {', '.join(names)}"] if len(names) > 1 else []
    return "; ".join([*([field.description] if field.description else []), *options])
