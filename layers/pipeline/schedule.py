"""Pipeline schedules as data: what each stage does, in order, a function of (stages, microbatches, chunks) alone.

A stage holds `chunks` pieces of the model, each a virtual stage: piece c of stage i is number ``c stages + i`` of the
pieces in order. An *order* says in which order a stage computes; `program` puts the transfers in. Nothing here knows of
ranks or arrays: `layers.simulate` proves a schedule and times it, without MPI.

References
----------
Huang et al.: GPipe, 2019. Narayanan et al.: PipeDream-2BW, 2021 (1F1B). Narayanan et al.: Efficient large-scale
language model training on GPU clusters, 2021 (interleaved). Qi et al.: Zero bubble pipeline parallelism, 2023 (ZB-H1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from colossal_mpi.errors import OptionError
from colossal_mpi.layout import part


@dataclass(frozen=True)
class Instruction:
    """One step of a stage, for one microbatch and one of the stage's chunks."""

    microbatch: int
    chunk: int = 0


class Forward(Instruction):
    """Compute the chunk and keep its cache."""


class BackwardInput(Instruction):
    """Compute the cotangent of the chunk's input; the weight products are put off."""


class BackwardWeight(Instruction):
    """Compute the weight products that were put off and forget the cache."""


@dataclass(frozen=True)
class Transfer(Instruction):
    """A message from or to another stage; `microbatch` and `chunk` are those of the sender."""

    peer: int = 0


class SendActivation(Transfer):
    """Begin to send the chunk's output to the stage `peer`."""


class ReceiveActivation(Transfer):
    """Wait for the input of the next piece from the stage `peer`."""


class SendGradient(Transfer):
    """Begin to send the cotangent of the chunk's input to the stage `peer`."""


class ReceiveGradient(Transfer):
    """Wait for the cotangent of an output from the stage `peer`."""


Order = Callable[[int, int, int, int], Iterator[Instruction]]
"""A function of (stages, microbatches, chunks, stage) that yields the computations of a stage in their order."""


@dataclass(frozen=True)
class ScheduleKind:
    """An entry of the registry of pipeline schedules.

    Parameters
    ----------
    name : str
        Name in configurations and on the command line.
    order : callable
        ``order(stages, microbatches, chunks, stage)`` yields the computations of a stage in their order.
    description : str
        One sentence for help texts and tables.
    interleaved : bool
        Whether a stage holds two chunks of the model or more; it holds one otherwise.
    defers_weights : bool
        Whether weight products may come later than right after the input cotangent of their microbatch.
    """

    name: str
    order: Order
    description: str
    interleaved: bool = False
    defers_weights: bool = False


SCHEDULES: dict[str, ScheduleKind] = {}
"""The pipeline schedules by the names that configurations give them."""


def register_schedule(
    name: str, description: str, *, interleaved: bool = False, defers_weights: bool = False
) -> Callable[[Order], Order]:
    """Return a decorator that registers a function as the order of a pipeline schedule.

    Parameters
    ----------
    name : str
        Name of the schedule in configurations and on the command line.
    description : str
        One sentence for help texts and tables.
    interleaved : bool
        Whether a stage holds two chunks of the model or more; it holds one otherwise.
    defers_weights : bool
        Whether weight products may come later than right after the input cotangent of their microbatch. Recomputed
        layers then keep what these products need.

    Returns
    -------
    callable
        Decorator that returns the function unchanged. The function is called as ``order(stages, microbatches, chunks,
        stage)`` and yields a `Forward`, a `BackwardInput` and a `BackwardWeight` for each microbatch and chunk; the
        transfers between stages are put in by `program`. The decorator raises `OptionError` if another function has
        the name.

    Examples
    --------
    >>> @register_schedule("one-by-one", "Finish each microbatch before the next one starts.")
    ... def one_by_one(stages, microbatches, chunks, stage):
    ...     for i in range(microbatches):
    ...         yield from (Forward(i), BackwardInput(i), BackwardWeight(i))
    """

    def register(order: Order) -> Order:
        taken = SCHEDULES.get(name)
        if taken is not None and getattr(taken.order, "__qualname__", None) != getattr(order, "__qualname__", None):
            raise OptionError(f"register_schedule({name!r}): another schedule has this name; choose another one")
        SCHEDULES[name] = ScheduleKind(name, order, description, interleaved, defers_weights)
        return order

    return register


@register_schedule("gpipe", "All forward passes, then all backward passes.")
def gpipe(stages: int, microbatches: int, chunks: int, stage: int) -> Iterator[Instruction]:
    """Yield all forwards, then all backwards. Keeps the caches of all microbatches."""
    for c in range(chunks):
        yield from (Forward(mb, c) for mb in range(microbatches))
    for c in reversed(range(chunks)):
        for mb in range(microbatches):
            yield from (BackwardInput(mb, c), BackwardWeight(mb, c))


@register_schedule("interleaved", "1F1B with several chunks of the model on each stage.", interleaved=True)
@register_schedule("1f1b", "One forward pass, one backward pass: as few caches as there are stages.")
def one_f_one_b(stages: int, microbatches: int, chunks: int, stage: int) -> Iterator[Instruction]:
    """Yield a backward as soon as there is one. Keeps ``min(microbatches, stages - stage)`` caches.

    With more than one chunk this is the interleaved schedule: groups of microbatches go through one chunk after the
    other, which divides the bubble by the number of chunks.
    """
    groups = _groups(stages, microbatches)
    forwards = [(mb, c) for group in groups for c in range(chunks) for mb in group]
    backwards = [(mb, c) for group in groups for c in reversed(range(chunks)) for mb in group]
    ahead = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * len(groups[0])
    ahead = min(ahead, len(forwards))
    for i in range(len(forwards) + ahead):
        if i < len(forwards):
            yield Forward(*forwards[i])
        if ahead <= i:
            yield from (BackwardInput(*backwards[i - ahead]), BackwardWeight(*backwards[i - ahead]))


def _groups(stages: int, microbatches: int) -> list[range]:
    """Return groups of at least `stages` microbatches, larger ones first: a short one would leave the rest waiting."""
    count = max(1, microbatches // stages)
    return [range(*part(microbatches, count, i)) for i in range(count)]


@register_schedule("zero-bubble", "1F1B with weight products put off into the bubble: ZB-H1.", defers_weights=True)
def zero_bubble(stages: int, microbatches: int, chunks: int, stage: int) -> Iterator[Instruction]:
    """Yield 1F1B with the weight products of stage i put off by i microbatches: ZB-H1. Keeps `stages` caches.

    The input cotangents are then not kept waiting by weight products, which fill the bubble at the end.
    """
    ahead, done = stages - stage - 1, 0
    for i in range(microbatches + ahead):
        if i < microbatches:
            yield Forward(i)
        if ahead <= i:
            yield BackwardInput(i - ahead)
            # Of the products that are put off one is due after each backward, and in the cool-down one more is free.
            if i - ahead - done >= stage or i >= microbatches:
                yield BackwardWeight(done)
                done += 1
    yield from (BackwardWeight(mb) for mb in range(done, microbatches))


def program(schedule: str, stages: int, microbatches: int, stage: int, chunks: int = 1) -> Iterator[Instruction]:
    """Yield what a stage does in a step: its order, each computation between its receive and its send.

    Parameters
    ----------
    schedule : {"gpipe", "1f1b", "interleaved", "zero-bubble"}
    stages, microbatches : int
        1 or more; any number of microbatches.
    stage : int
    chunks : int
        Virtual stages per stage: 2 or more for ``interleaved``, 1 for the others.

    Raises
    ------
    OptionError
        If there is no such schedule or it cannot have that many chunks.
    """
    _check(schedule, stages, microbatches, chunks)
    for step in SCHEDULES[schedule].order(stages, microbatches, chunks, stage):
        yield from _with_transfers(step, stages, chunks, stage)


def _check(schedule: str, stages: int, microbatches: int, chunks: int) -> None:
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule={schedule!r}: use one of {', '.join(map(repr, SCHEDULES))}")
    if min(stages, microbatches, chunks) < 1 or (chunks > 1) != SCHEDULES[schedule].interleaved:
        several = ", ".join(repr(name) for name, kind in SCHEDULES.items() if kind.interleaved)
        raise OptionError(
            f"schedule={schedule!r} of {stages} stages, {microbatches} microbatches and {chunks} virtual stages each: "
            f"all must be 1 or more, with 2 virtual stages or more for {several} and 1 for the others"
        )


def _with_transfers(step: Instruction, stages: int, chunks: int, stage: int) -> Iterator[Instruction]:
    mb, piece = step.microbatch, step.chunk * stages + stage
    before, after = piece - 1, piece + 1
    if isinstance(step, BackwardInput):
        before, after = after, before
    receive, send = (
        (ReceiveGradient, SendGradient) if isinstance(step, BackwardInput) else (ReceiveActivation, SendActivation)
    )
    moves = stages > 1 and not isinstance(step, BackwardWeight)
    if moves and 0 <= before < stages * chunks:
        yield receive(mb, before // stages, before % stages)
    yield step
    if moves and 0 <= after < stages * chunks:
        yield send(mb, step.chunk, after % stages)


def balanced(costs: list[float], parts: int) -> list[range]:
    """Cut a list of layers into contiguous parts, of which the costliest costs as little as can be.

    Parameters
    ----------
    costs : list of float
        Of each layer, 0 or more.
    parts : int
        Stages times chunks.

    Raises
    ------
    OptionError
        If there are more parts than layers.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise OptionError(f"{n} layers cannot be cut into {parts} parts: use from 1 to {n}")
    # least[k][j]: the smallest greatest cost of the first j layers in k parts, and where the last part begins.
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    least = {1: {j: (total[j], 0) for j in range(1, n + 1)}}
    for k in range(2, parts + 1):
        least[k] = {
            j: min((max(least[k - 1][i][0], total[j] - total[i]), i) for i in range(k - 1, j)) for j in range(k, n + 1)
        }
    cuts, j = [n], n
    for k in range(parts, 0, -1):
        j = least[k][j][1]
        cuts.append(j)
    cuts.reverse()
    return [range(a, b) for a, b in pairwise(cuts)]
