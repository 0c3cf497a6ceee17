"""The configuration of a run: one TOML file, validated, every key with a default and a reason."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from colossal_mpi.errors import ConfigError

SHIPPED = Path(__file__).parent / "configs"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Section):
    """The GPT."""

    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(128, ge=1, description="width of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    context: int = Field(64, ge=1, description="tokens per sequence")
    vocabulary: int = Field(256, ge=256, description="tokens; bytes need 256")


class Data(_Section):
    """The corpus, as bytes."""

    files: list[str] = Field([], description="text files; none: CPython's own documentation (pydoc_data.topics)")
    validation: float = Field(0.1, gt=0, le=0.5, description="share of the corpus that is held out, in stretches")


class Training(_Section):
    """The optimisation."""

    steps: int = Field(400, ge=1)
    batch: int = Field(16, ge=1, description="sequences per step, over all ranks and microbatches")
    microbatches: int = Field(1, ge=1, description="parts of the batch whose gradients are accumulated")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="greatest learning rate")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up; a cosine follows")
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, description="greatest norm of the gradient")
    seed: int = 0
    evaluate_every: int = Field(100, ge=1, description="steps between validations")
    evaluate_batches: int = Field(8, ge=1, description="batches per validation")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    log_every: int = Field(20, ge=1, description="steps between lines of progress without a terminal")
    sample: int = Field(160, ge=0, description="bytes of text generated at the end")

    @model_validator(mode="after")
    def _microbatches_fit(self) -> Training:
        if self.microbatches > self.batch:
            raise ValueError(f"microbatches={self.microbatches} must be at most batch={self.batch}")
        return self


class Parallel(_Section):
    """The grid and the mode."""

    grid: dict[Literal["data", "depth", "row", "col"], Annotated[int, Field(ge=1)]] = Field(
        {}, description="size of each axis, outermost first; empty: data over all ranks"
    )
    tensor: Literal["none", "1d", "2d", "2.5d", "3d"] = "none"
    keep_gathered: bool = Field(True, description="keep gathered operands for the backward pass: faster, more memory")
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Run(_Section):
    """Where the results go."""

    directory: str = Field("runs/run", description="config, metrics, plot and checkpoints")


class Config(_Section):
    """A run."""

    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    parallel: Parallel = Parallel()
    run: Run = Run()


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
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
        raise ConfigError(
            f"cannot read config {source}: {problem.strerror}; give a file or one of: {shipped}"
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
        return Config.model_validate(table)
    except ValidationError as problem:
        lines = [_explain(error) for error in problem.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}={error['input']!r}; known here are {', '.join(_known(error['loc'][:-1]))}"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}"
    return f"{key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _known(sections: Sequence[int | str]) -> list[str]:
    section: Any = Config
    for name in sections:
        section = section.model_fields[name].annotation
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
