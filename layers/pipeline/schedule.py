"""Pipeline schedules as data: a schedule is a function of three numbers that gives each stage's instructions in order.

The numbers are the stages, the microbatches and the chunks of the model on each stage. Chunk c of stage i, a virtual
stage, is number ``c stages + i`` in the order of the model. An *order* yields the computations of a stage; `program`
puts the transfers between them. Nothing here knows of ranks or arrays: ``simulation`` proves and times a schedule
without MPI, and ``stage`` carries it out. A new schedule is one function under `register_schedule`.

References
----------
Huang et al.: GPipe, 2019. Narayanan et al.: PipeDream-2BW, 2021 (1F1B). Narayanan et al.: Efficient large-scale
language model training on GPU clusters, 2021 (interleaved). Qi et al.: Zero bubble pipeline parallelism, 2023 (ZB-H1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from colossal_mpi.errors import OptionError
from colossal_mpi.layout import part


@dataclass(frozen=True)
class Instruction:
    """One instruction of a stage, for one microbatch and one chunk.

    Parameters
    ----------
    microbatch : int
        Number of the microbatch, from 0.
    chunk : int
        Number of the chunk among those of the stage, from 0.
    """

    microbatch: int
    chunk: int = 0


class Forward(Instruction):
    """Run the forward pass of the chunk and keep its cache.

    Parameters
    ----------
    microbatch : int
        Number of the microbatch, from 0.
    chunk : int
        Number of the chunk among those of the stage, from 0.
    """


class BackwardInput(Instruction):
    """Compute the cotangent of the chunk's input, and put the weight products off.

    Parameters
    ----------
    microbatch : int
        Number of the microbatch, from 0.
    chunk : int
        Number of the chunk among those of the stage, from 0.
    """


class BackwardWeight(Instruction):
    """Compute the weight products that were put off, and free the cache.

    Parameters
    ----------
    microbatch : int
        Number of the microbatch, from 0.
    chunk : int
        Number of the chunk among those of the stage, from 0.
    """


@dataclass(frozen=True)
class Transfer(Instruction):
    """A message between this stage and the stage `peer`. The sender counts `microbatch` and `chunk`."""

    peer: int = 0


class SendActivation(Transfer):
    """Start to send the chunk's output to the stage `peer`."""


class ReceiveActivation(Transfer):
    """Wait for the input of the next chunk from the stage `peer`."""


class SendGradient(Transfer):
    """Start to send the cotangent of the chunk's input to the stage `peer`."""


class ReceiveGradient(Transfer):
    """Wait for the cotangent of a chunk's output from the stage `peer`."""


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
    planned : bool
        Whether the planner tries the schedule.
    """

    name: str
    order: Order
    description: str
    interleaved: bool = False
    defers_weights: bool = False
    planned: bool = True


SCHEDULES: dict[str, ScheduleKind] = {}
"""The pipeline schedules by the names that configurations give them."""


def register_schedule(
    name: str, description: str, *, interleaved: bool = False, defers_weights: bool = False, planned: bool = True
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
    planned : bool
        Whether the planner tries the schedule; false for one that is never the best.

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
        SCHEDULES[name] = ScheduleKind(name, order, description, interleaved, defers_weights, planned)
        return order

    return register


@register_schedule("gpipe", "All forward passes, then all backward passes.", planned=False)  # 1F1B has fewer caches
def gpipe(stages: int, microbatches: int, chunks: int, stage: int) -> Iterator[Instruction]:
    """Yield all forward passes, then all backward passes. A stage keeps the caches of all microbatches."""
    for c in range(chunks):
        yield from (Forward(mb, c) for mb in range(microbatches))
    for c in reversed(range(chunks)):
        for mb in range(microbatches):
            yield from (BackwardInput(mb, c), BackwardWeight(mb, c))


@register_schedule("interleaved", "1F1B with several chunks of the model on each stage.", interleaved=True)
@register_schedule("1f1b", "One forward pass, one backward pass: as few caches as there are stages.")
def one_f_one_b(stages: int, microbatches: int, chunks: int, stage: int) -> Iterator[Instruction]:
    """Yield each backward pass as soon as its cotangent can be there: 1F1B, and with several chunks interleaved 1F1B.

    A stage keeps ``min(microbatches, stages - stage)`` caches. With several chunks, groups of microbatches go through
    one chunk after the other, which divides the bubble by the number of chunks.
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
    """Return groups of at least `stages` microbatches, larger groups first: the others would wait for a short one."""
    count = max(1, microbatches // stages)
    return [range(*part(microbatches, count, i)) for i in range(count)]


@register_schedule("zero-bubble", "1F1B with weight products put off into the bubble: ZB-H1.", defers_weights=True)
def zero_bubble(stages: int, microbatches: int, chunks: int, stage: int) -> Iterator[Instruction]:
    """Yield 1F1B with the weight products of stage i put off by i microbatches: ZB-H1. A stage keeps `stages` caches.

    Weight products then delay no input cotangent, and fill the bubble at the end.
    """
    ahead, done = stages - stage - 1, 0
    for i in range(microbatches + ahead):
        if i < microbatches:
            yield Forward(i)
        if ahead <= i:
            yield BackwardInput(i - ahead)
            # After each backward pass one of the products that were put off is due; the cool-down has time for one
            # more.
            if i - ahead - done >= stage or i >= microbatches:
                yield BackwardWeight(done)
                done += 1
    yield from (BackwardWeight(mb) for mb in range(done, microbatches))


def program(schedule: str, stages: int, microbatches: int, stage: int, chunks: int = 1) -> Iterator[Instruction]:
    """Yield the instructions of a stage for one training step: each computation between its receive and its send.

    Parameters
    ----------
    schedule : str
        Name of a registered schedule: ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"zero-bubble"`` or another one.
    stages : int
        Number of stages.
    microbatches : int
        Number of microbatches. It need not be a multiple of the stages.
    stage : int
        Number of the stage, from 0.
    chunks : int
        Number of chunks (virtual stages) on each stage: 2 or more for interleaved schedules, 1 for the others.

    Yields
    ------
    Instruction
        Computations and transfers in the order of the stage.

    Raises
    ------
    OptionError
        If the schedule is not registered or cannot have that many chunks.

    Examples
    --------
    >>> list(program("1f1b", stages=1, microbatches=1, stage=0))
    [Forward(microbatch=0, chunk=0), BackwardInput(microbatch=0, chunk=0), BackwardWeight(microbatch=0, chunk=0)]
    """
    _require_possible(schedule, stages, microbatches, chunks)
    for computation in SCHEDULES[schedule].order(stages, microbatches, chunks, stage):
        yield from _with_transfers(computation, stages, chunks, stage)


def _require_possible(schedule: str, stages: int, microbatches: int, chunks: int) -> None:
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule={schedule!r}: use one of {', '.join(map(repr, SCHEDULES))}")
    if min(stages, microbatches, chunks) < 1 or (chunks > 1) != SCHEDULES[schedule].interleaved:
        several = ", ".join(repr(name) for name, kind in SCHEDULES.items() if kind.interleaved)
        raise OptionError(
            f"schedule={schedule!r} of {stages} stages, {microbatches} microbatches and {chunks} virtual stages each: "
            f"all must be 1 or more, with 2 virtual stages or more for {several} and 1 for the others"
        )


def _with_transfers(computation: Instruction, stages: int, chunks: int, stage: int) -> Iterator[Instruction]:
    microbatch, number = computation.microbatch, computation.chunk * stages + stage
    before, after = number - 1, number + 1
    receive: type[Transfer] = ReceiveActivation
    send: type[Transfer] = SendActivation
    if isinstance(computation, BackwardInput):
        before, after = after, before
        receive, send = ReceiveGradient, SendGradient
    moves = stages > 1 and not isinstance(computation, BackwardWeight)
    if moves and 0 <= before < stages * chunks:
        yield receive(microbatch, before // stages, before % stages)
    yield computation
    if moves and 0 <= after < stages * chunks:
        yield send(microbatch, computation.chunk, after % stages)
