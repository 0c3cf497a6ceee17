"""Estimates: what a step of a candidate costs, from dry runs of models of one and two blocks.

The cost of a step is linear in the number of blocks of a stage. The difference of the two models is the cost of a
block, and the rest is the cost of the embedding and the head. Both hold for every candidate in which a rank does the
same work: any number of stages, any schedule, and microbatches of that size. `search` makes hundreds of estimates from
some tens of dry runs, and forecasts only the best candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from colossal_mpi.apps.config import Config
from colossal_mpi.apps.planning.candidates import with_settings
from colossal_mpi.apps.planning.forecast import StageCost, axes_of, dry_runs, programs
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
from colossal_mpi.machine import Machine


@dataclass(frozen=True)
class _PartCost:
    """The cost of a step on one rank for some blocks, or for the rest of a model."""

    forward: float
    """Seconds of the forward pass of a microbatch."""
    backward: float
    """Seconds of its backward pass."""
    after: float
    """Seconds of a step after the passes: reductions and the update."""
    stored: float
    """Bytes of weights, gradients and the state of the optimizer."""
    saved: float
    """Bytes that a microbatch keeps from its forward to its backward pass."""
    passing: float
    """Further bytes at the peak."""

    def plus(self, other: _PartCost, times: float) -> _PartCost:
        """Return the sum with a multiple of another cost."""
        return _PartCost(*(a + times * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def at_least(self, share: float, update: bool) -> _PartCost:
        """Return a lower bound for a share of the samples; `update` adds the time after the passes."""
        after = self.after if update else 0.0
        return replace(_ZERO, forward=share * self.forward, backward=share * self.backward, after=after)


_ZERO = _PartCost(*[0.0] * len(fields(_PartCost)))

_Place = tuple[tuple[tuple[str, int], ...], str]
"""The axes of a stage, and the tensor mode."""
_Run = tuple[_Place, int, str, int]
"""The key of a dry run: place, ZeRO stage, recomputation, samples of a microbatch."""


@dataclass(frozen=True)
class Estimate:
    """The estimated cost of a step of a configuration.

    Attributes
    ----------
    config : Config
    seconds : float
        Seconds of a step.
    peak : float
        The most bytes of arrays that are alive at any moment, on the rank that needs most.
    stored : float
        Bytes of weights, gradients and optimizer state, which no smaller microbatch saves.
    """

    config: Config
    seconds: float
    peak: float
    stored: float


class Estimates:
    """The estimates for one machine, and the dry runs behind them, which later estimates reuse.

    Parameters
    ----------
    machine : Machine
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._known: dict[_Run, tuple[_PartCost, _PartCost]] = {}
        self._largest: dict[tuple[_Place, int], tuple[int, _PartCost, _PartCost]] = {}
        """For each grid, mode and ZeRO stage the largest microbatch so far: samples of a rank, block and rest."""

    def of(self, config: Config) -> Estimate:
        """Return the estimate of a configuration.

        Raises
        ------
        ColossalError
            The error that the run itself would raise, if it cannot run on that grid.
        """
        block, rest = self._parts(config)
        samples, key = _samples_of_rank(config), (_place(config), config.parallel.zero)
        if key not in self._largest or samples > self._largest[key][0]:
            self._largest[key] = samples, block, rest
        return _estimate(config, block, rest)

    def lower_bound(self, config: Config) -> float:
        """Return a lower bound of the seconds of a step, 0 if nothing is known of the grid and the mode.

        A sample takes no less time in a smaller microbatch, recomputation and ZeRO shorten no pass, and a shorter
        backward pass leaves no fewer reductions for its end.
        """
        samples, place, own = _samples_of_rank(config), _place(config), config.parallel.zero
        found = [0.0]
        for zero in {0, own}:
            known = self._largest.get((place, zero))
            if known is not None and known[0] >= samples:
                block, rest = (part.at_least(samples / known[0], zero == own) for part in known[1:])
                found.append(_estimate(config, block, rest).seconds)
        return max(found)

    def _parts(self, config: Config) -> tuple[_PartCost, _PartCost]:
        """Return the cost of a block, and of the rest of the model."""
        parallel, (axes, tensor), size = config.parallel, _place(config), _microbatch(config)
        key = ((axes, tensor), parallel.zero, parallel.recompute, size)
        if key not in self._known:
            alone = {"batch": 2 * size, "microbatches": 2, "schedule": "1f1b", "virtual_stages": 1}
            one, two = (self._run(with_settings(config, dict(axes), tensor, **alone), n) for n in (1, 2))
            block = two.plus(one, -1)
            self._known[key] = block, one.plus(block, -1)
        return self._known[key]

    def _run(self, config: Config, layers: int) -> _PartCost:
        """Return the cost of a model of a number of blocks, by a dry run with two microbatches."""
        model = config.model.model_copy(update={"layers": layers})
        (run,) = dry_runs(config.model_copy(update={"model": model}), self.machine)
        cost = StageCost(run)
        first, last = (sum(cost.seconds_of(kind(i, 0)) for kind in (BackwardInput, BackwardWeight)) for i in (0, 1))
        passing = run.peak - cost.stored - run.saved * run.live
        after = cost.after + last - first  # the last backward pass also reduces gradients
        return _PartCost(cost.seconds_of(Forward(0, 0)), first, after, cost.stored, run.saved, passing)


def _place(config: Config) -> _Place:
    axes = {axis: size for axis, size in axes_of(config).items() if axis != PIPE} or {"data": 1}
    return tuple(axes.items()), config.parallel.tensor


def _microbatch(config: Config) -> int:
    """Return the samples of the largest microbatch."""
    return -(-config.training.batch // config.training.microbatches)


def _samples_of_rank(config: Config) -> int:
    """Return the samples of the largest microbatch on the rank that has most of them."""
    return -(-_microbatch(config) // axes_of(config).get("data", 1))


def _estimate(config: Config, block: _PartCost, rest: _PartCost) -> Estimate:
    """Return the estimate that follows from the cost of a block and of the rest of the model."""
    stages, chunks = axes_of(config).get(PIPE, 1), config.parallel.virtual_stages
    inner = _ZERO.plus(block, -(-config.model.layers // stages))
    parts = [*[inner] * (stages - 1), inner.plus(rest, 1)]
    steps = programs(config)
    spans, live = simulate(steps, _seconds_of(parts, chunks), 0.0), verify(steps).live
    peaks = [p.stored + p.passing + p.saved * n / chunks for p, n in zip(parts, live, strict=True)]
    seconds = makespan(spans) + max(p.after for p in parts)
    return Estimate(config, seconds, max(peaks), max(p.stored for p in parts))


def _seconds_of(parts: list[_PartCost], chunks: int) -> Callable[[Instruction, int], float]:
    """Return the seconds of each computation of a schedule, for the costs of its stages."""

    def seconds(step: Instruction, stage: int) -> float:
        part = parts[stage]
        if isinstance(step, Forward):
            return part.forward / chunks
        return part.backward / chunks / 2  # inputs and weights take equally long

    return seconds
