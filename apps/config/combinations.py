"""Combinations of keys that no run can have, each of them possible alone; found before any rank does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from colossal_mpi.errors import ColossalError, ConfigError


def problems(config: Any) -> list[str]:
    """Return what is wrong with a configuration, a line each: the keys, their values and what would work."""
    found = []
    for keys, check in _checks(config):
        try:
            check()
        except ColossalError as problem:
            found.append(f"{', '.join(f'{key}={_value(config, key)!r}' for key in keys)}: {problem}")
    return found


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _checks(config: Any) -> Iterator[tuple[list[str], Callable[[], Any]]]:
    from colossal_mpi.layers.attention.self_attention import head_width
    from colossal_mpi.layers.parallelism import require_axes
    from colossal_mpi.layers.pipeline.schedule import program
    from colossal_mpi.layers.pipeline.stage import PIPE

    model, parallel, training = config.model, config.parallel, config.training
    groups = getattr(model, "groups", model.heads)
    heads = ["model.heads", *(["model.groups"] if groups != model.heads else [])]
    place = {axis: size for axis, size in parallel.grid.items() if axis != PIPE}
    order = (parallel.schedule, parallel.grid.get(PIPE, 1), training.microbatches, 0, parallel.virtual_stages)
    yield heads, lambda: head_width(model.hidden, model.heads, groups)
    yield ["parallel.tensor"], lambda: require_axes(place, parallel.tensor)
    yield ["parallel.schedule", "parallel.virtual_stages"], lambda: next(program(*order), None)
    yield (
        ["training.keep_every"],
        lambda: _require(
            training.keep_last or not training.keep_every,
            "it keeps some of those that training.keep_last removes: set it",
        ),
    )
    yield (
        ["training.milestones"],
        lambda: _require(
            not training.milestones or training.rate == "multi-step", "these are of training.rate='multi-step'"
        ),
    )
    yield (
        ["data.shift"],
        lambda: _require(
            not config.data.shift or model.kind == "vit", "images are moved, of model.kind='vit'; of texts use 0"
        ),
    )


def _require(fits: Any, message: str) -> None:
    if not fits:
        raise ConfigError(message)
