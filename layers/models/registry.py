"""The registry of model kinds: the class, the configuration and the Hugging Face architectures of each model, by name.

The file of a model registers it with `register_model`. Checkpoints store the ``kind`` and the configuration of a model
(`describe`, `from_description`), `from_pretrained` and `save_pretrained` look up its architectures, and ``apps`` makes
the choices of ``model.kind`` and the training tasks from it. This module calls nothing but the classes that it is
given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

from colossal_mpi.errors import ConfigError, OptionError
from colossal_mpi.layers.containers import Sequential
from colossal_mpi.layers.layer import Layer
from colossal_mpi.layers.models.huggingface.architecture import Architecture
from colossal_mpi.layers.models.limits import beyond_limits
from colossal_mpi.layers.parallelism import Parallelism


class ModelConfig(Protocol):
    """The configuration of a model: a frozen dataclass whose fields JSON can hold."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def layers(self) -> int:
        """Number of blocks."""

    @property
    def seed(self) -> int | None:
        """Seed of the initial weights; None makes zeros, for weights that are loaded afterwards."""

    @property
    def dtype(self) -> str:
        """Name of the dtype of the weights."""


@dataclass(frozen=True)
class ModelKind:
    """One entry of the registry.

    Parameters
    ----------
    name : str
        The value of ``model.kind`` in configuration files and of ``kind`` in checkpoints.
    model : type of Sequential
        The class of the model, a chain of layers, which a pipeline can cut into stages. It is constructed as
        ``model(config, parallelism)`` and keeps `config` as an attribute.
    config : type of dataclass
        The frozen dataclass of its configuration, with fields ``layers``, ``seed`` and ``dtype`` among others.
    task : str
        The training task: ``"language"`` predicts the next token, ``"masked"`` fills in hidden tokens, ``"images"``
        classifies images. A program can register further tasks.
    huggingface : tuple of Architecture
        The architectures of Hugging Face that this model reads and writes; empty if there are none.
    """

    name: str
    model: type[Sequential]
    config: Callable[..., ModelConfig]
    task: str
    huggingface: tuple[Architecture, ...] = ()


MODELS: dict[str, ModelKind] = {}
"""Every registered kind of model by its name."""

Model = TypeVar("Model", bound=type[Sequential])


def register_model(
    name: str, config: type[ModelConfig], *, task: str = "language", huggingface: Sequence[Architecture] = ()
) -> Callable[[Model], Model]:
    """Return a class decorator that adds a model to the registry.

    Parameters
    ----------
    name : str
        The kind: the name of the model in configuration files and checkpoints.
    config : type
        The frozen dataclass of its configuration. JSON must be able to hold the fields; ``layers``, ``seed`` and
        ``dtype`` must be among them, and ``seed=None`` must make weights of zeros.
    task : str
        The training task: ``"language"``, ``"masked"``, ``"images"`` or another registered task, see `ModelKind`.
    huggingface : sequence of Architecture
        The mappings with which `from_pretrained` and `save_pretrained` read and write directories of Hugging Face.

    Returns
    -------
    callable
        A decorator that returns the class unchanged.

    Raises
    ------
    OptionError
        If `config` lacks one of the fields, or `name` is the kind of another class.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class MyConfig:
    ...     vocabulary: int = 256
    ...     layers: int = 2
    ...     seed: int | None = 0
    ...     dtype: str = "float32"
    >>> @register_model("mine", MyConfig)
    ... class MyModel(Sequential):
    ...     def __init__(self, config: MyConfig, parallelism: Parallelism) -> None:
    ...         self.config = config
    ...         super().__init__(Embedding(config.vocabulary, 8, parallelism, "tokens", seed=config.seed))
    """
    names = [field.name for field in fields(config)] if is_dataclass(config) else []
    lacks = [name for name in ("layers", "seed", "dtype") if name not in names]
    if lacks:
        raise OptionError(f"register_model({name!r}): {config.__name__} must be a dataclass with {', '.join(lacks)}")

    def register(model: Model) -> Model:
        taken = MODELS.get(name)
        if taken is not None and taken.model.__qualname__ != model.__qualname__:
            raise OptionError(f"register_model({name!r}): {taken.model.__name__} is of this kind; choose another name")
        MODELS[name] = ModelKind(name, model, config, task, tuple(huggingface))
        return model

    return register


def kind_of(model: Layer) -> ModelKind | None:
    """Return the registry's entry for a model, None if its class is not registered."""
    return next((kind for kind in MODELS.values() if type(model) is kind.model), None)


def config_of(model: Layer) -> ModelConfig:
    """Return the configuration of a model of a registered kind."""
    return cast("ModelConfig", vars(model)["config"])


def describe(model: Layer) -> dict[str, Any]:
    """Return the kind and the configuration of a model as values that JSON can hold, for the metadata of a checkpoint.

    Parameters
    ----------
    model : Layer
        A model of a registered kind.

    Returns
    -------
    dict
        ``kind`` and the fields of the configuration.

    Raises
    ------
    OptionError
        If the class of the model is not registered.
    """
    kind = kind_of(model)
    if kind is None:
        raise OptionError(f"a {type(model).__name__} has no kind: it must be one of {_known()}, or registered")
    return {"kind": kind.name, **asdict(config_of(model))}


def from_description(description: Mapping[str, Any], parallelism: Parallelism) -> Sequential:
    """Return the model that `describe` has described, with zeros for random weights: they are loaded afterwards.

    Parameters
    ----------
    description : mapping
        ``kind`` and fields of its configuration; the others take their defaults.
    parallelism : Parallelism
        The grid and the tensor mode of the new model, which may be others than the described model had.

    Returns
    -------
    Sequential
        A model of the class that is registered for ``kind``.

    Raises
    ------
    OptionError
        If there is no such kind, or its configuration has no such fields.
    ConfigError
        If a size of the model is beyond what a model can have.
    """
    if not isinstance(description, Mapping):
        raise OptionError(f"a model cannot be {description!r}: it must be a table of kind and sizes")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in description.items()}
    name = values.pop("kind", None)
    if not isinstance(name, str) or name not in MODELS:
        raise OptionError(f"there is no model of kind={name!r}: it must be one of {_known()}")
    kind = MODELS[name]
    try:
        config = kind.config(**{**values, "seed": None})
    except TypeError as problem:
        raise OptionError(f"this is no configuration of a {name}: {problem}") from None
    return construct(kind, config, parallelism)


def construct(kind: ModelKind, config: ModelConfig, parallelism: Parallelism) -> Sequential:
    """Return a model of a kind: all classes of models have the same two arguments.

    Raises
    ------
    ConfigError
        If a size is beyond `LIMITS` or a number is not finite: nothing is built then.
    """
    problem = beyond_limits({field.name: getattr(config, field.name) for field in fields(config)})
    if problem is not None:
        raise ConfigError(f"this is no configuration of a {kind.name}: {problem}")
    return cast("Callable[[ModelConfig, Parallelism], Sequential]", kind.model)(config, parallelism)


def _known() -> str:
    return ", ".join(sorted(MODELS))
