"""The grids and modes that a run could have on so many ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from colossal_mpi.apps.config import Config
from colossal_mpi.layers.pipeline import PIPE

Axes = dict[str, int]
Rungs = tuple[tuple[int, str], ...]

_ALONE: Rungs = ((0, "none"), (0, "selective"), (0, "full"))
_COPIED: Rungs = (
    (0, "none"),
    (1, "none"),
    (1, "selective"),
    (2, "selective"),
    (1, "full"),
    (2, "full"),
    (3, "none"),
    (3, "selective"),
    (3, "full"),
)
"""ZeRO stages and what is recomputed, by the memory that they save and what they cost."""


def grids(config: Config, ranks: int, sequences: bool) -> list[tuple[Axes, str]]:
    """Return the axes of grids of so many ranks that a model can fill, outermost first, and their tensor mode.

    Of the shapes of a mode the one is taken whose axes are the most alike. Sequences are cut one way at a time, and
    only if it is asked for: to cut the batch moves less, as long as there are samples.
    """
    found = []
    for pipe, data in product(divisors(ranks), repeat=2):
        if ranks % (pipe * data) or pipe > config.model.layers or data > config.training.batch:
            continue
        for cut in _sequences(config, ranks // pipe // data, sequences):
            for tensor, shape in shapes(config, ranks // pipe // data // math.prod(cut.values())):
                axes = {PIPE: pipe, "data": data, **cut, **shape}
                found.append(({axis: size for axis, size in axes.items() if size > 1} or {"data": 1}, tensor))
    return found


def divisors(n: int) -> list[int]:
    """Return the numbers that divide another, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _sequences(config: Config, ranks: int, wanted: bool) -> Iterator[Axes]:
    """Yield the ways to cut sequences over a part of some ranks."""
    yield {}
    for size in divisors(ranks)[1:] if wanted else []:
        if size <= getattr(config.model, "context", 0) // 2:
            yield {"seq": size}
        if size <= getattr(config.model, "groups", _heads(config)):
            yield {"ulysses": size}


def _heads(config: Config) -> int:
    """Return the number of attention heads; a model without heads is cut as if each feature were one."""
    heads: int = getattr(config.model, "heads", config.model.hidden)
    return heads


def shapes(config: Config, ranks: int) -> Iterator[tuple[str, Axes]]:
    """Yield the tensor modes of so many ranks, each with the shape that it does best in."""
    if ranks == 1:
        yield "none", {}
        return
    if ranks > config.model.hidden:
        return
    if ranks <= _heads(config):
        yield "1d", {"col": ranks}
    for tensor, names in (("2d", ("row", "col")), ("2.5d", ("depth", "row", "col")), ("3d", ("row", "col", "depth"))):
        even = most_even(ranks, len(names))
        if even is not None:
            yield tensor, dict(zip(names, even, strict=True))


def most_even(n: int, count: int) -> list[int] | None:
    """Return the factors, all above 1 and the smallest first, that are the most alike; None if there are not enough."""
    if count == 1:
        return [n] if n > 1 else None
    found = [[d, *rest] for d in divisors(n)[1:] if (rest := most_even(n // d, count - 1)) and d <= rest[0]]
    return min(found, key=lambda factors: factors[-1] / factors[0]) if found else None


def ladder(axes: Axes) -> Rungs:
    """Return the ZeRO stages and what is recomputed that are worth trying, until the memory is enough."""
    return _COPIED if any(axis in axes for axis in ("data", "seq", "ulysses")) else _ALONE


def variants(config: Config, axes: Axes) -> Iterator[dict[str, Any]]:
    """Yield schedules and numbers of microbatches, as settings; the later, the less memory without stages."""
    training, parallel, stages = config.training, config.parallel, axes.get(PIPE, 1)
    most = max(training.microbatches, training.batch // axes.get("data", 1))
    if stages == 1:
        for power in range((most // training.microbatches).bit_length()):
            yield {"microbatches": training.microbatches << power, "schedule": "1f1b", "virtual_stages": 1}
        return
    for microbatches in sorted({min(most, max(training.microbatches, n * stages)) for n in (1, 2, 4)}):
        for schedule in ("1f1b", "zero-bubble", "interleaved"):
            chunks = max(2, parallel.virtual_stages) if schedule == "interleaved" else 1
            if stages * chunks <= config.model.layers:
                yield {"microbatches": microbatches, "schedule": schedule, "virtual_stages": chunks}


def with_settings(config: Config, axes: Axes, tensor: str, **settings: Any) -> Config:
    """Return a configuration on another grid, with other keys of the sections parallel and training."""
    training = {key: value for key, value in settings.items() if key in type(config.training).model_fields}
    parallel = {key: value for key, value in settings.items() if key not in training}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "parallel": config.parallel.model_copy(update={"grid": axes, "tensor": tensor, **parallel}),
        }
    )
