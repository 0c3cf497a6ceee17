"""The interface between the trainer and a task, the registry of tasks, and the microbatches of a task's step.

A task is a model, its loss and its data. The trainer, the planner and ``generate`` call its methods; each file beside
this one registers one task, and the sections of the configuration for the kinds of models that it trains.
``layers.models.MODELS`` says which task a kind of model has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, cast, get_type_hints

import numpy as np
from pydantic import Field, create_model

from colossal_mpi.apps.config import Config, ModelSection
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers import AuxiliaryLosses, Context, Parallelism, Sequential
from colossal_mpi.layers.models import MODELS, ModelKind
from colossal_mpi.layers.pipeline import ArraySpec, Pipeline
from colossal_mpi.layout import part


@dataclass(frozen=True)
class Batch:
    """Some samples: the inputs of the model, and the labels that the loss compares its outputs to.

    Parameters
    ----------
    inputs : DistArray
        The inputs of `Task.model`, their first dim the samples.
    labels : DistArray or tuple of DistArray
        The labels that `Task.loss` takes.
    context : mapping of str to object
        Fields of the layers' `Context` that belong to the samples: ``mask``, ``segments``, ``order`` and ``documents``.
    """

    inputs: DistArray
    labels: Any
    context: Mapping[str, Any] = field(default_factory=dict)


class Task:
    """Base of all tasks: a model, its loss, and samples that are functions of the seed and their global number.

    Every rank calls every method, with the same arguments; each makes its own part of the arrays.

    Parameters
    ----------
    config : Config
        The configuration of the run; ``config.model`` is a subclass of `section`.
    parallelism : Parallelism
        The tensor mode on the grid of one stage.

    Attributes
    ----------
    section : type of ModelSection
        The keys that the task needs in the table ``[model]``; a class attribute.
    model : Sequential
        Its `forward` takes the inputs of a batch.
    name : str
        The name of the model for a reader.
    about : str
        The data, in words and numbers, for a reader.
    unit : str
        The unit of the speed, in the plural; `per_sample` of them are in a sample.
    per : str
        The unit that the loss is a mean over, in the singular.
    length : int
        Number of positions of the residual stream.
    tokenizer : str
        The JSON of the text's tokenizer, ``""`` for bytes.
    digest : str
        A digest of the data and of which are held out; a run is resumed only with the same one. ``""``: not known.
    held : int
        Number of samples of a validation.
    run : callable
        The forward pass, ``run(inputs, context) -> outputs``; the trainer replaces it where a pipeline cuts the model.
    pipeline : Pipeline or None
        The trainer's pipeline.
    """

    section: ClassVar[type[ModelSection]] = ModelSection
    model: Sequential
    name: str
    about: str
    unit: str
    per: str
    tokenizer: str = ""
    digest: str = ""
    per_sample: int
    length: int
    held: int

    def __init__(self, config: Config, parallelism: Parallelism) -> None:
        self.config, self.parallelism, self.grid = config, parallelism, parallelism.grid
        self.run: Callable[[Any, Context], Any] = lambda x, ctx: self.model.forward(x, ctx)[0]
        self.pipeline: Pipeline | None = None

    @classmethod
    def complete(cls, config: Config) -> Config:
        """Return the configuration with the sizes of the model that its data decide; the same one by default.

        Parameters
        ----------
        config : Config
            The configuration as the user gave it.

        Returns
        -------
        Config
            The configuration that the run has.

        Raises
        ------
        ConfigError
            If a file of the data cannot be read.
        """
        return config

    def activation_spec(self, samples: int, length: int | None = None) -> ArraySpec:
        """Return global shape, layout and dtype of the residual stream.

        Parameters
        ----------
        samples : int
            Number of samples.
        length : int, optional
            Number of positions of each; `length` of the task by default.

        Returns
        -------
        tuple
            Shape ``[samples, length, hidden]``, layout and dtype.
        """
        length = self.length if length is None else length
        return (samples, length, self.config.model.hidden), self.parallelism.stream(), self.config.parallel.dtype

    def batch(self, first: int, stop: int) -> Batch:
        """Return the training samples number `first` to `stop`, counted from the start of the run.

        Parameters
        ----------
        first, stop : int
            Half-open range of sample numbers.

        Returns
        -------
        Batch
            Inputs and labels of ``stop - first`` samples.
        """
        raise NotImplementedError

    def held_out(self) -> Iterator[Batch]:
        """Yield the `held` samples of a validation.

        Yields
        ------
        Batch
            The next samples, the same in every validation.
        """
        raise NotImplementedError

    def weight(self, first: int, stop: int) -> float:
        """Return how many samples the training samples number `first` to `stop` count as in the mean of the loss.

        Parameters
        ----------
        first, stop : int
            Half-open range of sample numbers.

        Returns
        -------
        float
            Their number by default; less if some of their labels do not count.
        """
        return stop - first

    def held_weight(self) -> float:
        """Return how many samples the held-out ones count as in the mean of the loss.

        Returns
        -------
        float
            `held` by default; less if some of their labels do not count.
        """
        return self.held

    def loss(self, outputs: Any, labels: Any, samples: float) -> tuple[float, Any]:
        """Return this batch's part of the mean loss over a number of samples.

        Parameters
        ----------
        outputs : DistArray or tuple of DistArray
            Outputs of the model.
        labels : DistArray or tuple of DistArray
            Labels of the batch.
        samples : float
            Number of samples that the mean is over, as `weight` counts them; a batch of a microbatch or of a validation
            has fewer.

        Returns
        -------
        loss : float
            In nats, the same on all ranks.
        cache : object
            The argument of `backward`.
        """
        raise NotImplementedError

    def backward(self, saved: Any, scale: float = 1.0) -> Any:
        """Return the cotangent of the outputs.

        Parameters
        ----------
        saved : object
            The cache that `loss` returned.
        scale : float
            Factor of the loss, for 16-bit floats.

        Returns
        -------
        DistArray or tuple of DistArray
            The cotangents, of the outputs' shapes.
        """
        raise NotImplementedError

    def measures(self, outputs: Any, labels: Any, samples: int) -> Mapping[str, float]:
        """Return this batch's part of each share that a validation reports; none by default.

        Parameters
        ----------
        outputs : DistArray or tuple of DistArray
            Outputs of the model.
        labels : DistArray or tuple of DistArray
            Labels of the batch.
        samples : int
            Number of samples that a share is over.

        Returns
        -------
        mapping of str to float
            By name, for example ``accuracy``; the parts of all batches add up to the share, from 0 to 1.
        """
        return {}

    def sample(self, count: int) -> bytes:
        """Return text that shows what the model can do.

        Parameters
        ----------
        count : int
            Wanted number of bytes.

        Returns
        -------
        bytes
            The text, the same on all ranks.
        """
        raise NotImplementedError


TASKS: dict[str, type[Task]] = {}
"""The tasks by the names that ``layers.models`` gives them; `register_task` adds one."""

_SECTIONS: dict[str, type[ModelSection]] = {}
_GIVEN = ("positions", "seed", "dtype")
"""Fields of a model's configuration that its task sets, from ``context``, ``training.seed`` and ``parallel.dtype``."""


def register_task(name: str, task: type[Task]) -> None:
    """Add a task, which trains all kinds of models that are registered for it.

    Parameters
    ----------
    name : str
        The value of ``task`` in `colossal_mpi.layers.models.register_model`.
    task : type of Task
        The class that makes the model, its batches and its loss from a configuration.

    Raises
    ------
    OptionError
        If there is a task of this name.

    Examples
    --------
    >>> register_task("next-byte", CausalLanguage)
    """
    if name in TASKS:
        raise OptionError(f"register_task({name!r}): {TASKS[name].__name__} has this name; choose another")
    TASKS[name] = task


def register_section(kind: str, section: type[ModelSection]) -> None:
    """Declare the table ``[model]`` of a kind of model, with a range and a description for each key.

    A kind without a declared section has the keys and defaults of its configuration's dataclass.

    Parameters
    ----------
    kind : str
        The name that the model is registered under.
    section : type of ModelSection
        The schema; a subclass of the `section` of the model's task.

    Raises
    ------
    OptionError
        If the kind has a section.

    Examples
    --------
    >>> class Section(LanguageSection):
    ...     width: int = Field(352, ge=1, description="width of the MLP")
    >>> register_section("my-model", Section)
    """
    if kind in _SECTIONS:
        raise OptionError(f"register_section({kind!r}): {_SECTIONS[kind].__name__} is its section; choose another name")
    _SECTIONS[kind] = section


def sections() -> dict[str, type[ModelSection]]:
    """Return the section of each kind of model that some task trains.

    Returns
    -------
    dict of str to type of ModelSection
        The sections by kind; a section that nobody declared is made from the dataclass of the model's configuration.
    """
    for name, kind in MODELS.items():
        if name not in _SECTIONS and kind.task in TASKS:
            _SECTIONS[name] = _derived_section(name, kind, TASKS[kind.task].section)
    return {name: _SECTIONS[name] for name in sorted(_SECTIONS) if name in MODELS}


def _derived_section(name: str, kind: ModelKind, base: type[ModelSection]) -> type[ModelSection]:
    hints = get_type_hints(kind.config)
    keys: dict[str, Any] = {}
    for one in _fields(kind):
        if one.name not in _GIVEN:
            default = ... if one.default is dataclasses.MISSING else one.default
            keys[one.name] = (hints[one.name], Field(default, description=one.metadata.get("description")))
    return create_model(name, __base__=base, __doc__=(kind.model.__doc__ or name).splitlines()[0], **keys)


def make_model(config: Config, parallelism: Parallelism, **sizes: object) -> tuple[Sequential, Any]:
    """Return the model of a configuration, with new random weights.

    Parameters
    ----------
    config : Config
        The configuration of the run; its section ``model`` says the kind and the sizes.
    parallelism : Parallelism
        The tensor mode on the grid of one stage.
    **sizes
        Fields of the model's configuration that the data decide. Those that its dataclass lacks are left out.

    Returns
    -------
    model : Sequential
        A model of the class that is registered for the kind.
    model_config : dataclass
        The configuration that it was made with.
    """
    kind = MODELS[config.model.kind]
    values = {**config.model.model_dump(), "seed": config.training.seed, "dtype": config.parallel.dtype, **sizes}
    model_config = kind.config(**{one.name: values[one.name] for one in _fields(kind) if one.name in values})
    return cast("Callable[..., Sequential]", kind.model)(model_config, parallelism), model_config


def _fields(kind: ModelKind) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of the configuration of a kind of model."""
    return dataclasses.fields(cast("type[Any]", kind.config))


def make(config: Config, parallelism: Parallelism) -> Task:
    """Return the task of a configuration.

    Parameters
    ----------
    config : Config
        The configuration of the run.
    parallelism : Parallelism
        The tensor mode on the grid of one stage.

    Returns
    -------
    Task
        The task that trains models of this kind, with its model made and its data opened.

    Raises
    ------
    ConfigError
        If the data cannot be read or do not fit the model, on all ranks.

    Notes
    -----
    **Communication:** rank 0 reads the data of small files and broadcasts it to all ranks.
    """
    return TASKS[MODELS[config.model.kind].task](config, parallelism)


def complete(config: Config) -> Config:
    """Return a configuration with the sizes of the model that its data decide.

    Parameters
    ----------
    config : Config
        The configuration as the user gave it.

    Returns
    -------
    Config
        The same, but, for example, with the vocabulary of a token store where the file gives none.

    Raises
    ------
    ConfigError
        If a file of the data cannot be read.
    """
    return TASKS[MODELS[config.model.kind].task].complete(config)


class StepFeed:
    """The microbatches of a training step of a task, as a pipeline takes them.

    Parameters
    ----------
    task : Task
        The task; every rank makes its own part of each microbatch.
    step : int
        Number of the step, from 0.
    scale : float
        Factor of the loss in the backward pass.
    first : int, optional
        Number of the first sample of the step, counted from the start of the run; by default every step before took as
        many samples.

    Attributes
    ----------
    size : int
        Number of samples of the step.
    microbatches : int
        Number of microbatches.
    own : list of dict
        For each forward pass of a microbatch through some layers, the losses that those layers added, by name.
    """

    def __init__(self, task: Task, step: int, scale: float = 1.0, first: int | None = None) -> None:
        training, self.scale = task.config.training, scale
        self.task, self.step, self.size, self.microbatches = task, step, training.batch, training.microbatches
        self.first = step * self.size if first is None else first
        self._batch = lru_cache(maxsize=1)(self._make_batch)
        self.own: list[dict[str, float]] = []
        self.weight = task.weight(self.first, self.first + self.size)

    def _make_batch(self, microbatch: int) -> Batch:
        low, high = self._range(microbatch)
        return self.task.batch(self.first + low, self.first + high)

    def _range(self, microbatch: int) -> tuple[int, int]:
        return part(self.size, self.microbatches, microbatch)

    def context(self, microbatch: int) -> Context:
        """Return the layers' context: step, samples and the fields that the task's batch adds.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        Context
            A new context, whose losses are the last entry of `own`.
        """
        low, high = self._range(microbatch)
        share, rest = (high - low) / self.size, self._batch(microbatch).context
        self.own.append({})
        given = Context(step=self.step, sample=low, auxiliary=AuxiliaryLosses(share, self.own[-1]))
        return replace(given, scale=self.scale, **rest)

    def inputs(self, microbatch: int) -> DistArray:
        """Return the inputs of the model.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        DistArray
            The inputs of its samples.
        """
        return self._batch(microbatch).inputs

    def loss(self, y: Any, microbatch: int) -> tuple[float, Any]:
        """Return the microbatch's part of the loss, and the argument of `loss_backward`.

        Parameters
        ----------
        y : DistArray or tuple of DistArray
            Outputs of the model.
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        loss : float
            In nats; the parts of all microbatches add up to the mean over the step.
        cache : object
            The argument of `loss_backward`.
        """
        return self.task.loss(y, self._batch(microbatch).labels, self.weight)

    def loss_backward(self, cache: Any) -> Any:
        """Return the cotangent of the outputs, times the loss scale.

        Parameters
        ----------
        cache : object
            The cache that `loss` returned.

        Returns
        -------
        DistArray or tuple of DistArray
            The cotangents, of the outputs' shapes.
        """
        return self.task.backward(cache, self.scale)

    def activation_spec(self, microbatch: int) -> ArraySpec:
        """Return shape, layout and dtype of the residual stream.

        Parameters
        ----------
        microbatch : int
            Number of the microbatch, from 0.

        Returns
        -------
        tuple
            Shape ``[samples, length, hidden]``, layout and dtype.
        """
        low, high = self._range(microbatch)
        return self.task.activation_spec(high - low)


def whole(array: DistArray) -> np.ndarray:
    """Return a small global array on every rank. **Communication:** an allgather of the array."""
    gathered = array.gather()
    assert gathered is not None
    return gathered
