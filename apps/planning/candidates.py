"""The grids, tensor modes, schedules and memory-saving settings that a training run can have on a number of ranks.

`search` goes through these candidates; `estimate` and `forecast` state the costs of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from colossal_mpi.apps.config import Config
from colossal_mpi.layers import MODES
from colossal_mpi.layers.pipeline import PIPE, SCHEDULES

Axes = dict[str, int]
"""The axes of a grid and their sizes, outermost first."""
Saving = tuple[int, str]
"""A ZeRO stage, and the kind of recomputation."""

_ALONE: tuple[Saving, ...] = ((0, "none"), (0, "selective"), (0, "full"))
_REPLICATED: tuple[Saving, ...] = (
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
"""Each saves more memory, or costs less time, than the ones before it. ZeRO needs ranks that replicate weights."""


def grids(config: Config, ranks: int, sequences: bool) -> list[tuple[Axes, str]]:
    """Return the grids of a number of ranks that a model can fill, each with a tensor mode.

    Each mode has only the shape with the most even axes. Sequences are cut only if `sequences` is
    true, and by one axis at a time: cutting the batch moves fewer words as long as there are samples.
    """
    found = []
    for pipe, data in product(divisors(ranks), repeat=2):
        if ranks % (pipe * data) or pipe > config.model.layers or data > config.training.batch:
            continue
        for cut in _sequence_axes(config, ranks // pipe // data, sequences):
            for tensor, shape in tensor_shapes(config, ranks // pipe // data // math.prod(cut.values())):
                axes = {PIPE: pipe, "data": data, **cut, **shape}
                found.append(({axis: size for axis, size in axes.items() if size > 1} or {"data": 1}, tensor))
    return found


def divisors(n: int) -> list[int]:
    """Return the divisors of a number, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _sequence_axes(config: Config, ranks: int, sequences: bool) -> Iterator[Axes]:
    """Yield the axes that can cut sequences with some of the ranks, no axis first."""
    yield {}
    for size in divisors(ranks)[1:] if sequences else []:
        if size <= getattr(config.model, "context", 0) // 2:
            yield {"seq": size}
        if size <= getattr(config.model, "groups", _heads(config)):
            yield {"ulysses": size}


def _heads(config: Config) -> int:
    """Return the number of attention heads; a model without heads is cut as if each feature were one."""
    heads: int = getattr(config.model, "heads", config.model.hidden)
    return heads


def tensor_shapes(config: Config, ranks: int) -> Iterator[tuple[str, Axes]]:
    """Yield the tensor modes for a number of ranks, each with the most even shape of its axes."""
    if ranks == 1:
        yield "none", {}
        return
    if ranks > config.model.hidden:
        return
    for mode in MODES.values():
        even = even_factors(ranks, len(mode.axes)) if mode.axes else None
        # Where one axis cuts the model, every rank needs a head.
        if even is not None and (len(even) > 1 or ranks <= _heads(config)):
            yield mode.name, dict(zip(mode.axes, even, strict=True))


def even_factors(n: int, count: int) -> list[int] | None:
    """Return `count` factors of n, all above 1 and the smallest first, with the smallest ratio of last to first.

    None if n has fewer factors.
    """
    if count == 1:
        return [n] if n > 1 else None
    found = [[d, *rest] for d in divisors(n)[1:] if (rest := even_factors(n // d, count - 1)) and d <= rest[0]]
    return min(found, key=lambda factors: factors[-1] / factors[0]) if found else None


def savings(axes: Axes) -> tuple[Saving, ...]:
    """Return the ZeRO stages and kinds of recomputation to try on a grid, until the memory is enough."""
    return _REPLICATED if any(axis in axes for axis in ("data", "seq", "ulysses")) else _ALONE


def schedules(config: Config, axes: Axes) -> Iterator[dict[str, Any]]:
    """Yield schedules and numbers of microbatches, as settings. Without stages each needs less memory than the last."""
    training, parallel, stages = config.training, config.parallel, axes.get(PIPE, 1)
    most = max(training.microbatches, training.batch // axes.get("data", 1))
    if stages == 1:
        for power in range((most // training.microbatches).bit_length()):
            schedule = type(parallel)().schedule  # any schedule will do: a single stage never waits
            yield {"microbatches": training.microbatches << power, "schedule": schedule, "virtual_stages": 1}
        return
    for microbatches in sorted({min(most, max(training.microbatches, n * stages)) for n in (1, 2, 4)}):
        for kind in SCHEDULES.values():
            chunks = max(2, parallel.virtual_stages) if kind.interleaved else 1
            if kind.planned and stages * chunks <= config.model.layers:
                yield {"microbatches": microbatches, "schedule": kind.name, "virtual_stages": chunks}


def with_settings(config: Config, axes: Axes, tensor: str, **settings: Any) -> Config:
    """Return a configuration on another grid, with other values of keys of the sections parallel and training."""
    training = {key: value for key, value in settings.items() if key in type(config.training).model_fields}
    parallel = {key: value for key, value in settings.items() if key not in training}
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "parallel": config.parallel.model_copy(update={"grid": axes, "tensor": tensor, **parallel}),
        }
    )
