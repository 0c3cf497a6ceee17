"""The configuration of a run: one TOML file, validated, every key with a default and a reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import ValidationError

from colossal_mpi.apps.config.combinations import problems
from colossal_mpi.apps.config.sections import GPT, KINDS, Data, Model, Parallel, Run, Section, Training
from colossal_mpi.errors import ConfigError

_WIDTH = 110
SHIPPED = Path(__file__).parents[1] / "configs"


class Config(Section):
    """A run."""

    model: Model = GPT()
    data: Data = Data()
    training: Training = Training()
    parallel: Parallel = Parallel()
    run: Run = Run()


def shipped() -> str:
    """Return the names of the configurations that come with the package."""
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml")))


def load(source: str, settings: Sequence[str] = ()) -> Config:
    """Return the validated configuration of a TOML file, with ``section.key=value`` settings put over it.

    Parameters
    ----------
    source : str
        A path, or the name of a shipped configuration such as ``demo``.
    settings : sequence of str
        Values are TOML; anything else is a string.

    Raises
    ------
    ConfigError
        One message that names every key at fault, its value, the file and what would work.
    """
    path = Path(source) if Path(source).suffix else SHIPPED / f"{source}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(
            f"cannot read config {source}: {problem.strerror}; give a file or one of: {shipped()}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
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
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {setting!r}: {section} is a value, not a section")
    table[key] = value


def validate(table: Mapping[str, Any], source: str) -> Config:
    """Return the configuration that a table describes, or raise ConfigError naming `source`."""
    try:
        config = Config.model_validate(table)
        lines = problems(config)
    except ValidationError as problem:
        lines = [_explain(error) for error in problem.errors()]
    if lines:
        raise ConfigError(f"{source}: " + "; ".join(lines))
    return config


def _explain(error: Any) -> str:
    place, kind = [str(part) for part in error["loc"]], None
    if place[0] == "model" and len(place) > 1:
        kind = place.pop(1)  # a union says which of its members it means
    key = ".".join(place)
    if error["type"] == "union_tag_invalid":
        return f"{key}.kind={error['ctx']['tag']!r}: input should be {error['ctx']['expected_tags']}"
    if error["type"] == "extra_forbidden":
        where = f"here (kind={kind!r})" if kind else "here"
        return f"unknown key {key}={error['input']!r}; known {where} are {', '.join(_known(place[:-1], kind))}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known(sections: Sequence[str], kind: str | None) -> list[str]:
    section: Any = Config
    for name in sections:
        section = KINDS[kind] if kind else section.model_fields[name].annotation
    return list(section.model_fields)


def parse_grid(text: str) -> dict[str, int]:
    """Return the axes of ``data=2,row=2,col=2``.

    Raises
    ------
    ConfigError
        If it is not of that form.
    """
    axes: dict[str, int] = {}
    for piece in text.split(","):
        axis, equals, size = piece.partition("=")
        if not equals or not size.strip().isdigit() or not axis.strip().isidentifier() or axis.strip() in axes:
            raise ConfigError(f"--grid {text!r}: write axis=size with commas between, for example data=2,row=2,col=2")
        axes[axis.strip()] = int(size)
    return axes


def grid_setting(axes: Mapping[str, int]) -> str:
    """Return the setting, as `load` takes it, that gives a run a grid of these axes."""
    return f"parallel.grid={{ {', '.join(f'{axis} = {size}' for axis, size in axes.items())} }}"


def dump(config: Config) -> str:
    """Return a configuration as TOML."""
    return tomli_w.dumps(config.model_dump())


def commented(config: Config) -> str:
    """Return a configuration as TOML with what each key means, as the file of a run can have it."""
    lines = [
        "# Every key of this run. Give the file to `colossal-mpi train`, or single keys with --set section.key=value."
    ]
    for name in Config.model_fields:
        section = getattr(config, name)
        lines += ["", f"[{name}]  # {(section.__doc__ or '').splitlines()[0]}"]
        for key, field in type(section).model_fields.items():
            lines += _explained(f"{key} = {_inline(getattr(section, key))}", _meaning(field))
    return "\n".join(lines) + "\n"


def _explained(line: str, meaning: str) -> list[str]:
    """Return a key with its comment beside it, or above it where that is longer than a line."""
    beside = f"{line}  # {meaning}"
    return [beside] if len(beside) <= _WIDTH else [*(f"# {part}" for part in wrap(meaning, _WIDTH - 2)), line]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _meaning(field: Any) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    options = [f"one of {', '.join(map(str, choices))}"] if len(choices) > 1 else []
    return "; ".join([*([field.description] if field.description else []), *options])
