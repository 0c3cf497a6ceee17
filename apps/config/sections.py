"""The sections of a configuration: every key with its range, a default and a reason.

`load` validates a TOML file against `Config`. Keys that name something in a registry of ``layers`` take their choices
from it at each validation, so that a plugin's names are choices, too. The section of a model kind is declared
beside its task, in ``apps.training.tasks``; here are the classes that such sections derive from.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from colossal_mpi.apps.config.plugins import absolute
from colossal_mpi.errors import ConfigError
from colossal_mpi.layers import MODES, SEQUENCE_MODES
from colossal_mpi.layers.kernels import choices as kernel_choices
from colossal_mpi.layers.models import beyond_limits
from colossal_mpi.layers.optim import LEARNING_RATES, OPTIMIZERS, Option
from colossal_mpi.layers.pipeline import PIPE, SCHEDULES

_TASKS = "colossal_mpi.apps.training.tasks"
"""The module with the section of each kind of model. It imports this package, and so is imported when needed."""


class Section(BaseModel):
    """A table of a TOML file; a key that it does not list is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        """Document each key of a section under Parameters, by its description."""
        keys = [f"{name} : {_type_of(field)}\n    {_sentence(field)}" for name, field in cls.model_fields.items()]
        text = (cls.__doc__ or "").partition("\n\nParameters\n")[0]
        cls.__doc__ = "\n".join([text, "", "Parameters", "----------", *keys])


def _type_of(field: FieldInfo) -> str:
    kind = field.annotation
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return name if field.is_required() or field.default_factory else f"{name}, default {field.default!r}"


def _sentence(field: FieldInfo) -> str:
    text = field.description or "a field of the model's configuration"
    return f"{text[0].upper()}{text[1:]}."


@dataclass(frozen=True, eq=False)
class Choice:
    """Marks a string that must be one of the names in a registry.

    Parameters
    ----------
    names : callable
        Returns the names. Each validation calls it again, since plugins add names.
    """

    names: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._one_of_them, handler(source))

    def _one_of_them(self, value: str) -> str:
        names = list(self.names())
        if value not in names:
            *first, last = map(repr, names)
            expected = f"{', '.join(first)} or {last}" if first else last
            raise PydanticCustomError("choice", "Input should be {expected}", {"expected": expected})
        return value


def _axes() -> list[str]:
    """Return the names that the axes of a training grid may have, outermost first."""
    modes = sorted((mode.axes for mode in MODES.values()), key=len, reverse=True)
    return list(dict.fromkeys((PIPE, "data", "seq", "ulysses", *(axis for axes in modes for axis in axes))))


class ModelSection(Section):
    """The keys that every kind of model has: the number of layers and the width of the residual stream."""

    reads: ClassVar[Literal["text", "images"]] = "text"
    """What the files of ``data.files`` hold for this kind of model."""

    kind: Annotated[str, Choice(lambda: model_sections())] = Field(description="kind of model")
    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(128, ge=1, description="width of the residual stream")

    @model_validator(mode="after")
    def _within_limits(self) -> ModelSection:
        problem = beyond_limits(dict(self))
        if problem is not None:
            raise ValueError(problem)
        return self


class TransformerSection(ModelSection):
    """The keys of a transformer."""

    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    std: float = Field(0.02, gt=0, allow_inf_nan=False, description="standard deviation of the initial weights")


class TextSection(ModelSection):
    """The keys of a model that reads a text."""

    context: int = Field(64, ge=1, description="tokens per sequence")


def model_sections() -> Mapping[str, type[ModelSection]]:
    """Return the section of each kind of model, plugins' kinds included.

    Returns
    -------
    mapping of str to type of ModelSection
        The sections by the value of ``model.kind``.
    """
    sections: Mapping[str, type[ModelSection]] = importlib.import_module(_TASKS).sections()
    return sections


class _Kind(BaseModel):
    kind: Annotated[str, Choice(model_sections)] = "gpt"


def _of_its_kind(table: Any) -> ModelSection:
    """Validate the table ``[model]`` against the section of its ``kind``; without one it is a GPT."""
    if isinstance(table, ModelSection):
        return table
    if not isinstance(table, Mapping):
        raise PydanticCustomError("dict_type", "Input should be a valid dictionary")
    kind = _Kind.model_validate(table).kind
    return model_sections()[kind].model_validate({**table, "kind": kind})


Model = Annotated[SerializeAsAny[ModelSection], PlainValidator(_of_its_kind)]
"""The section of the model that is trained, by its ``kind``."""


class Data(Section):
    """The training data: texts as bytes or tokens, or images."""

    files: list[str] = Field(
        [],
        description="texts, or token stores (.h5, of `colossal-mpi data prepare`) or other files of tokens; "
        "for a vit .npz files with arrays images and labels. Without any: CPython's own documentation "
        "(pydoc_data.topics), or scikit-learn's digits",
    )
    format: Literal["auto", "text", "jsonl"] = Field(
        "auto", description="auto: by name and content; text: the bytes as they are; jsonl: a document in each line"
    )
    dtype: Literal["", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"] = Field(
        "", description="dtype of the tokens of files without a header, little-endian: uint16 for those of nanoGPT"
    )
    documents: Literal["joined", "separate"] = Field(
        "joined",
        description="separate: tokens of a sequence see only those of their own document, positions start anew in "
        "each, and no label is of another; joined: a sequence is one text",
    )
    end_token: int | None = Field(
        None,
        ge=0,
        description="for documents=separate, the token that ends a document in files of tokens that do not say where "
        "documents end: 50256 for tokens of GPT-2",
    )
    shift: int = Field(0, ge=0, description="greatest number of pixels that an image is moved by before each use")
    validation: float = Field(
        0.1, gt=0, le=0.5, description="share of the data that is held out: stretches of a text, or random images"
    )
    changed: bool = Field(
        False, description="with --resume, this once: go on though the data are not those of the checkpoint"
    )

    @model_validator(mode="after")
    def _one_reading(self) -> Data:
        if self.dtype and self.format != "auto":
            raise ValueError(f"dtype={self.dtype} is for tokens, and format={self.format} for text: give one of them")
        return self


class Training(Section):
    """The training: steps, batches, optimizer, learning rate, validations and checkpoints."""

    steps: int = Field(400, ge=1, description="number of optimizer steps")
    batch: int = Field(16, ge=1, le=1 << 24, description="samples per step, over all ranks and microbatches")
    microbatches: int = Field(1, ge=1, description="parts of the batch; their gradients are accumulated")
    optimizer: Annotated[str, Choice(lambda: OPTIMIZERS)] = Field(
        "adamw", description="rule by which gradients change weights"
    )
    optimizer_options: dict[str, Any] = Field(
        {}, description="options of this optimizer alone, for example { momentum = 0.9 } for sgd"
    )
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="peak of the learning rate")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    rate: Annotated[str, Choice(lambda: LEARNING_RATES)] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    rate_options: dict[str, Any] = Field(
        {}, description="options of this learning-rate schedule alone, for example { power = 2.0 } for polynomial"
    )
    floor: float = Field(0.1, ge=0, le=1, description="share of lr at the end")
    milestones: list[int] = Field(
        [], description="for rate multi-step: from each of these steps on, the learning rate is a tenth"
    )
    weight_decay: float = Field(
        0.1, ge=0, allow_inf_nan=False, description="decay of weight matrices and embedding tables"
    )
    clip: float = Field(1.0, gt=0, description="greatest norm of the gradients; longer ones are scaled down to it")
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, which validations use; 0: no average",
    )
    seed: int = Field(0, description="seed of the initial weights, of dropout and of the order of the samples")
    evaluate_every: int = Field(100, ge=1, description="steps between validations")
    evaluate_batches: int = Field(
        8, ge=1, description="batches of text per validation; a validation takes all held-out images"
    )
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    check_replicas: int = Field(
        0, ge=0, description="steps between comparisons of the replicas of weights and optimizer states; 0: none"
    )
    keep_last: int = Field(0, ge=0, description="newest checkpoints that are kept; 0 keeps all")
    keep_every: int = Field(
        0, ge=0, description="with keep_last: checkpoints at multiples of this many steps are kept, too"
    )
    background_checkpoints: bool = Field(
        True, description="go on training while a thread writes a copy of the state; the copy takes host memory"
    )
    nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="after a NaN or an infinity in a step, of which no weight is updated: stop; skip leaves the step "
        "out; rollback goes back to a checkpoint and on with other samples",
    )
    rollback_steps: int = Field(
        0, ge=0, description="for nonfinite rollback: least number of steps between the checkpoint and the step"
    )
    log_every: int = Field(20, ge=1, description="steps between lines of progress where there is no terminal")
    sample: int = Field(
        160, ge=0, description="bytes of text that the model writes at the end; 0 shows no text and no images"
    )

    @model_validator(mode="after")
    def _microbatches_fit(self) -> Training:
        if self.microbatches > self.batch:
            raise ValueError(f"microbatches={self.microbatches} must be at most batch={self.batch}")
        return self

    def optimizer_arguments(self) -> dict[str, Any]:
        """Return ``optimizer_options`` as keyword arguments of the optimizer.

        Returns
        -------
        dict of str to object
            Values of the types that the optimizer declares.

        Raises
        ------
        ConfigError
            If the optimizer has no such option, or a value is of another type.
        """
        return _arguments(self.optimizer, self.optimizer_options, OPTIMIZERS[self.optimizer].options)

    def rate_arguments(self) -> dict[str, Any]:
        """Return ``rate_options``, ``floor`` and ``milestones`` as keyword arguments of the learning-rate schedule.

        Returns
        -------
        dict of str to object
            Values of the types that the schedule declares; ``floor`` and ``milestones`` only where it has them.

        Raises
        ------
        ConfigError
            If the schedule has no such option, or a value is of another type.
        """
        known = LEARNING_RATES[self.rate].options
        keys = {"floor": self.floor, "milestones": tuple(self.milestones)}
        common = {name: value for name, value in keys.items() if name in known}
        return common | _arguments(self.rate, self.rate_options, known)


def _arguments(name: str, given: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Return the options of a registered optimizer or learning-rate schedule, each of its declared type."""
    arguments: dict[str, Any] = {}
    for option, value in given.items():
        if option not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise ConfigError(f"{name!r} has no option {option!r}; {has}")
        try:
            arguments[option] = TypeAdapter[Any](cast("Any", known[option].annotation)).validate_python(value)
        except ValidationError as problem:
            message = problem.errors()[0]["msg"]
            raise ConfigError(f"option {option}={value!r} of {name!r}: {message[0].lower()}{message[1:]}") from None
    return arguments


class Parallel(Section):
    """The grid of ranks, and the distribution of model, batch and optimizer over it."""

    grid: dict[Annotated[str, Choice(_axes)], Annotated[int, Field(ge=1)]] = Field(
        {}, description="size of each axis, outermost first; empty: axis data over all ranks"
    )
    tensor: Annotated[str, Choice(lambda: MODES)] = Field(
        "none", description="how weights and activations are cut over col, row and depth"
    )
    sequence: Annotated[str, Choice(lambda: SEQUENCE_MODES)] = Field(
        "ring",
        description="attention over axis seq: ring passes keys and values round it; ulysses cuts the heads instead, as "
        "an axis ulysses always does",
    )
    schedule: Annotated[str, Choice(lambda: SCHEDULES)] = Field(
        "1f1b", description="order of the microbatches on the stages of pipe"
    )
    virtual_stages: int = Field(
        1, ge=1, description="chunks of the model on each stage; 2 or more for schedule interleaved"
    )
    zero: Literal[0, 1, 2, 3] = Field(
        0,
        description="stored once over data, seq and ulysses: 1 the optimizer's state, 2 also gradients, 3 also weights",
    )
    bucket: int = Field(
        1 << 20, ge=0, description="bytes of gradients that are reduced together while the backward pass goes on"
    )
    keep_gathered: bool = Field(
        True, description="keep gathered operands for the backward pass: faster, but more memory"
    )
    offload: bool = Field(False, description="keep the optimizer's state in host memory instead of a GPU's")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="recomputed in the backward pass: selective, outputs of norms and activations; full, whole blocks",
    )
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = Field(
        "float32", description="dtype of weights and activations; with 16 bits the optimizer has float32 master weights"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where blocks are stored; auto takes a GPU if CuPy finds one"
    )
    kernels: Annotated[str, Choice(kernel_choices)] = Field(
        "auto",
        description="local formulas: torch, PyTorch's kernels; reference, formulas in NumPy or CuPy; auto, torch if it "
        "is installed",
    )


class Adapter(Section):
    """Low-rank adapters (LoRA): the weights of a trained model stay as they are, and products beside them learn."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0: there are none, and all weights are trained")
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False, description="the adapters are scaled by alpha / rank")
    targets: list[str] = Field(
        ["*.attention.*"],
        min_length=1,
        description="patterns of the names of the products with adapters, for example *.attention.qkv or *.mlp.*",
    )
    base: str = Field(
        "",
        description="checkpoint or run whose weights a new run starts from, with the sizes of [model]; empty: random "
        "weights",
    )

    @model_validator(mode="after")
    def _has_a_rank(self) -> Adapter:
        if self.base and not self.rank:
            raise ValueError(f"base={self.base!r} is for adapters: give rank, for example 8")
        return self


class Run(Section):
    """The run directory, the measurements, and the plugins."""

    directory: str = Field(
        "runs/run", min_length=1, description="folder of the configuration, metrics, report and checkpoints"
    )
    peak_flops: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="flop/s of all ranks together, for MFU; 0: measured with matrix products",
    )
    trace_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [3], description="steps whose timeline on each rank goes into trace.json"
    )
    timeout: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="seconds for which a rank waits for the others before the job ends with a diagnosis, 0: for ever; "
        "by default COLOSSAL_MPI_TIMEOUT, or 600",
    )
    forecast: bool = Field(True, description="forecast a step at the end, for comparison; measures for some seconds")
    report: bool = Field(True, description="draw the report at the end; colossal-mpi report draws it at any time")
    tensorboard: bool = Field(False, description="write the metrics as event files, too, into events/ of the directory")
    plugins: Annotated[list[str], AfterValidator(absolute)] = Field(
        [], description="Python files or modules that register modes, optimizers, schedules or models; loaded first"
    )


class Config(Section):
    """The configuration of a run."""

    model: Model = Field(default_factory=lambda: _of_its_kind({}), description="section of the model, by its kind")
    data: Data = Field(Data(), description="section of the training data")
    training: Training = Field(Training(), description="section of steps, optimizer and checkpoints")
    parallel: Parallel = Field(Parallel(), description="section of the grid and of what its axes cut")
    adapter: Adapter = Field(Adapter(), description="section of the adapters that are trained in place of the weights")
    run: Run = Field(Run(), description="section of the run directory and the plugins")
