"""A first estimate of many ways to run: dry runs of models of one and two blocks, from which the rest follows.

What a step takes is linear in the blocks of a stage: the difference of the two models is a block, and what is left is
the embedding and the head. They are shared by all ways to run in which a rank does the same: any number of stages,
schedules, and microbatches of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.candidates import with_settings
from colossal_mpi.apps.planning.cost import Cost
from colossal_mpi.apps.planning.forecast import axes_of, dry_runs, programs
from colossal_mpi.layers.pipeline import (
    PIPE,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    makespan,
    simulate,
    verify,
)
from colossal_mpi.meta.machine import Machine


@dataclass(frozen=True)
class _Part:
    """What blocks, or the rest of a model, take on a rank."""

    forward: float
    """Seconds of a microbatch."""
    backward: float
    after: float
    """Seconds of a step: reductions and the update."""
    stored: float
    """Bytes of weights, gradients and the optimizer's state."""
    saved: float
    """Bytes that a microbatch keeps."""
    passing: float
    """Bytes besides, at the peak."""

    def plus(self, other: _Part, times: float) -> _Part:
        """Return the sum with a number of others."""
        return _Part(*(a + times * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def least(self, share: float, update: bool) -> _Part:
        """Return what a share of the samples takes at least, without or with what comes after the passes."""
        after = self.after if update else 0.0
        return replace(_NOTHING, forward=share * self.forward, backward=share * self.backward, after=after)


_NOTHING = _Part(*[0.0] * len(fields(_Part)))


@dataclass(frozen=True)
class Estimate:
    """What a way to run may take."""

    config: Config
    seconds: float
    peak: float
    """Bytes of a rank."""
    stored: float
    """Bytes that no smaller microbatch saves."""


class Estimates:
    """Makes estimates for a machine, and remembers the dry runs behind them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._known: dict[Any, tuple[_Part, _Part]] = {}
        self._largest: dict[Any, tuple[int, _Part, _Part]] = {}
        """Of each grid, mode and ZeRO stage the largest microbatch yet: the samples of a rank, a block and the rest."""

    def of(self, config: Config) -> Estimate:
        """Return the estimate of a configuration.

        Raises
        ------
        ColossalError
            As the run would, if it cannot be on that grid.
        """
        block, rest = self._parts(config)
        rows, key = _rows(config), (_place(config), config.parallel.zero)
        if rows > self._largest.get(key, (0,))[0]:
            self._largest[key] = rows, block, rest
        return _estimate(config, block, rest)

    def least(self, config: Config) -> float:
        """Return the seconds that a configuration takes at least, 0 if nothing is known of its grid and mode.

        A sample takes no less in a smaller microbatch, recomputation and ZeRO shorten no pass, and when a shorter
        backward pass ends no fewer reductions are left.
        """
        rows, place, own = _rows(config), _place(config), config.parallel.zero
        found = [0.0]
        for zero in {0, own}:
            known, *parts = self._largest.get((place, zero), (0,))
            if known >= rows:
                found.append(_estimate(config, *(part.least(rows / known, zero == own) for part in parts)).seconds)
        return max(found)

    def _parts(self, config: Config) -> tuple[_Part, _Part]:
        """Return a block and the rest of the model."""
        parallel, (axes, tensor), size = config.parallel, _place(config), _size(config)
        key = (axes, tensor, parallel.zero, parallel.recompute, size)
        if key not in self._known:
            alone = {"batch": 2 * size, "microbatches": 2, "schedule": "1f1b", "virtual_stages": 1}
            one, two = (self._run(with_settings(config, dict(axes), tensor, **alone), n) for n in (1, 2))
            block = two.plus(one, -1)
            self._known[key] = block, one.plus(block, -1)
        return self._known[key]

    def _run(self, config: Config, layers: int) -> _Part:
        model = config.model.model_copy(update={"layers": layers})
        (run,) = dry_runs(config.model_copy(update={"model": model}), self.machine)
        cost = Cost(run)
        back, last = (sum(cost.seconds_of(kind(i, 0)) for kind in (BackwardInput, BackwardWeight)) for i in (0, 1))
        passing = run.peak - cost.stored - run.saved * run.live
        return _Part(cost.seconds_of(Forward(0, 0)), back, cost.after + last - back, cost.stored, run.saved, passing)


def _place(config: Config) -> tuple[tuple[tuple[str, int], ...], str]:
    """Return the axes of a stage, and the tensor mode."""
    axes = {axis: size for axis, size in axes_of(config).items() if axis != PIPE} or {"data": 1}
    return tuple(axes.items()), config.parallel.tensor


def _size(config: Config) -> int:
    """Return the samples of the largest microbatch."""
    return -(-config.training.batch // config.training.microbatches)


def _rows(config: Config) -> int:
    """Return how many of them the rank with most has."""
    return -(-_size(config) // axes_of(config).get("data", 1))


def _estimate(config: Config, block: _Part, rest: _Part) -> Estimate:
    """Return what a way to run takes of which the blocks and the rest are known."""
    stages, chunks = axes_of(config).get(PIPE, 1), config.parallel.virtual_stages
    inner = _NOTHING.plus(block, -(-config.model.layers // stages))
    parts = [*[inner] * (stages - 1), inner.plus(rest, 1)]
    steps = programs(config)
    spans, live = simulate(steps, _cost(parts, chunks), 0.0), verify(steps).live
    peaks = [p.stored + p.passing + p.saved * n / chunks for p, n in zip(parts, live, strict=True)]
    seconds = makespan(spans) + max(p.after for p in parts)
    return Estimate(config, seconds, max(peaks), max(p.stored for p in parts))


def _cost(parts: list[_Part], chunks: int) -> Callable[[Instruction, int], float]:
    def cost(step: Instruction, stage: int) -> float:
        part = parts[stage]
        if isinstance(step, Forward):
            return part.forward / chunks
        return part.backward / chunks / 2  # as long for inputs as for weights

    return cost
