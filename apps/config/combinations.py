"""Combinations of keys that no run can have, although each key alone is valid.

`validate` and the planner ask for them before any rank begins to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from colossal_mpi.apps.config.sections import Config, TransformerSection
from colossal_mpi.errors import ColossalError, ConfigError
from colossal_mpi.layers import require_axes
from colossal_mpi.layers.attention import head_width
from colossal_mpi.layers.models import MODELS
from colossal_mpi.layers.optim import LEARNING_RATES
from colossal_mpi.layers.pipeline import PIPE, program


def problems(config: Config) -> list[str]:
    """Return what is wrong with a configuration.

    Parameters
    ----------
    config : Config
        A configuration whose keys are valid one by one.

    Returns
    -------
    list of str
        A line for each problem: the keys, their values and what would work.
    """
    found = []
    for keys, check in _checks(config):
        try:
            check()
        except ColossalError as problem:
            found.append(f"{', '.join(f'{key}={_value(config, key)!r}' for key in keys)}: {problem}")
    return found


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _checks(config: Config) -> Iterator[tuple[list[str], Callable[[], object]]]:
    """Yield keys, and a function that raises a ColossalError if their values do not go together."""
    model, parallel, training = config.model, config.parallel, config.training
    if isinstance(model, TransformerSection):
        heads, groups = model.heads, getattr(model, "groups", model.heads)
        keys = ["model.heads", *(["model.groups"] if groups != heads else [])]
        yield keys, lambda: head_width(model.hidden, heads, groups)
    axes = {axis: size for axis, size in parallel.grid.items() if axis != PIPE}
    yield ["parallel.tensor"], lambda: require_axes(axes, parallel.tensor)
    order = (parallel.schedule, parallel.grid.get(PIPE, 1), training.microbatches, 0, parallel.virtual_stages)
    yield ["parallel.schedule", "parallel.virtual_stages"], lambda: next(program(*order), None)
    yield (
        ["training.keep_every"],
        lambda: _require(
            training.keep_last > 0 or not training.keep_every,
            "it keeps some of those that training.keep_last removes: set it",
        ),
    )
    yield ["training.optimizer_options"], training.optimizer_arguments
    yield ["training.rate_options"], training.rate_arguments
    yield (
        ["training.milestones"],
        lambda: _require(
            not training.milestones or "milestones" in LEARNING_RATES[training.rate].options,
            "these are of training.rate='multi-step'",
        ),
    )
    yield (
        ["data.documents"],
        lambda: _require(
            config.data.documents == "joined" or MODELS[model.kind].task == "language",
            f"documents are kept apart for models that predict the next token, not for a {model.kind}: use 'joined'",
        ),
    )
    yield (
        ["data.shift"],
        lambda: _require(
            not config.data.shift or model.reads == "images",
            f"images are moved, and a model of kind {model.kind!r} reads text: use 0",
        ),
    )


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise ConfigError(message)
