"""Functions that prove and time pipeline schedules without MPI.

`verify` runs the programs of all stages against one another with bounded buffers, and `simulate` gives each computation
its time. The planner and the benchmark of schedules call them. Both see nothing but instructions.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from colossal_mpi.errors import ScheduleError
from colossal_mpi.layers.pipeline.schedule import (
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    ReceiveActivation,
    ReceiveGradient,
    SendActivation,
    SendGradient,
    Transfer,
)

Programs = Sequence[Sequence[Instruction]]
"""The instructions of each stage, as `program` yields them."""
Cost = Callable[[Instruction, int], float]
"""The time of a computation on a stage."""
_SEND_OF = {ReceiveActivation: SendActivation, ReceiveGradient: SendGradient}


@dataclass(frozen=True)
class Verification:
    """The caches and messages that a sound schedule needs.

    Parameters
    ----------
    live : list of int
        Greatest number of caches that are alive at once, for each stage.
    in_flight : int
        Greatest number of messages from one stage to another that are sent and not yet received.
    """

    live: list[int]
    in_flight: int


@dataclass(frozen=True)
class Interval:
    """The time of one computation.

    Parameters
    ----------
    stage : int
        Number of the stage.
    instruction : Instruction
        The computation.
    start : float
        When it starts, in the unit of the costs.
    stop : float
        When it ends, in the unit of the costs.
    """

    stage: int
    instruction: Instruction
    start: float
    stop: float


def verify(programs: Programs, buffers: int | None = None) -> Verification:
    """Prove that a schedule is sound, or raise an error that says where it is not.

    A schedule is sound if every microbatch has its forward, input and weight part once and in this order on every
    chunk, every receive has its send, both in the same order between two stages, and the programs come to their end.

    Parameters
    ----------
    programs : sequence of sequence of Instruction
        The instructions of each stage.
    buffers : int, optional
        Greatest number of messages that one stage may have under way to another. None: any number.

    Returns
    -------
    Verification
        The caches and messages that the schedule needs.

    Raises
    ------
    ScheduleError
        If the schedule is not sound.

    Examples
    --------
    >>> verify([list(program("1f1b", 2, 4, stage)) for stage in range(2)]).live
    [2, 1]
    """
    live = [_most_live(program, stage) for stage, program in enumerate(programs)]
    most = 0
    execution = _Execution(programs, buffers)
    while not execution.done:
        before = execution.executed
        for stage in range(len(programs)):
            execution.advance(stage)
        most = max(most, execution.most)
        if execution.executed == before:
            raise ScheduleError("the schedule never ends: " + "; ".join(execution.waits()))
    execution.require_empty()
    return Verification(live, most)


def _most_live(program: Sequence[Instruction], stage: int) -> int:
    """Return the greatest number of live caches, and require forward, input and weight part once each, in order."""
    parts = (Forward, BackwardInput, BackwardWeight)
    state: dict[tuple[int, int], int] = {}
    alive = most = 0
    for step in program:
        if not isinstance(step, parts):
            continue
        key, part = (step.microbatch, step.chunk), parts.index(type(step))
        if state.get(key, 0) != part:
            raise ScheduleError(f"stage {stage}: {step} comes out of its order: forward, input, weight, once each")
        state[key] = part + 1
        alive += {0: 1, 1: 0, 2: -1}[part]
        most = max(most, alive)
    if incomplete := [key for key, part in state.items() if part != len(parts)]:
        raise ScheduleError(f"stage {stage}: (microbatch, chunk) {incomplete[0]} has no whole backward pass")
    return most


class _Execution:
    """An execution of the programs of all stages, with the messages between them."""

    def __init__(self, programs: Programs, buffers: int | None) -> None:
        self.programs, self.buffers, self.executed, self.most = programs, buffers, 0, 0
        self.at = [0] * len(programs)
        self.channels: dict[tuple[int, int, type], deque[tuple[int, int]]] = {}
        self.in_flight: Counter[tuple[int, int]] = Counter()

    @property
    def done(self) -> bool:
        """True if all stages have come to the end of their programs."""
        return all(at == len(program) for at, program in zip(self.at, self.programs, strict=True))

    def advance(self, stage: int) -> None:
        """Execute a stage's instructions until it has to wait."""
        program = self.programs[stage]
        while self.at[stage] < len(program) and self._execute(stage, program[self.at[stage]]):
            self.at[stage] += 1
            self.executed += 1

    def _execute(self, stage: int, step: Instruction) -> bool:
        """Execute an instruction, or return False if the stage has to wait."""
        if not isinstance(step, Transfer):
            return True
        message = (step.microbatch, step.chunk)
        if type(step) not in _SEND_OF:
            pair = (stage, step.peer)
            if self.buffers is not None and self.in_flight[pair] >= self.buffers:
                return False
            self.channels.setdefault((*pair, type(step)), deque()).append(message)
            self.in_flight[pair] += 1
            self.most = max(self.most, self.in_flight[pair])
            return True
        pair = (step.peer, stage)
        waiting = self.channels.get((*pair, _SEND_OF[type(step)]))
        if not waiting:
            return False
        if waiting[0] != message:
            raise ScheduleError(f"stage {stage}: {step} comes where stage {step.peer} sends {waiting[0]} next")
        waiting.popleft()
        self.in_flight[pair] -= 1
        return True

    def waits(self) -> list[str]:
        """Return where each stage waits."""
        return [
            f"stage {i} waits at {program[at]}"
            for i, (at, program) in enumerate(zip(self.at, self.programs, strict=True))
            if at < len(program)
        ]

    def require_empty(self) -> None:
        """Require that every message was received."""
        for (source, target, _), messages in self.channels.items():
            if messages:
                raise ScheduleError(f"stage {source} sends {messages[0]} to stage {target}, which never receives it")


def simulate(programs: Programs, cost: Cost, transfer: float = 0.0) -> list[Interval]:
    """Return the interval of each computation. A message arrives `transfer` after its send, and a send takes no time.

    Parameters
    ----------
    programs : sequence of sequence of Instruction
        The instructions of each stage, which `verify` accepts.
    cost : callable
        ``cost(instruction, stage)`` returns the time of a `Forward`, `BackwardInput` or `BackwardWeight` on a stage.
    transfer : float
        Time of a message, in the unit of the costs.

    Returns
    -------
    list of Interval
        An interval for each computation.

    Examples
    --------
    >>> programs = [list(program("gpipe", 2, 4, stage)) for stage in range(2)]
    >>> makespan(simulate(programs, lambda instruction, stage: 1.0))
    14.0
    """
    clock, at = [0.0] * len(programs), [0] * len(programs)
    sent: dict[tuple[int, int, type, int, int], float] = {}
    intervals: list[Interval] = []

    def execute(stage: int, step: Instruction) -> bool:
        if not isinstance(step, Transfer):
            start = clock[stage]
            clock[stage] += cost(step, stage)
            intervals.append(Interval(stage, step, start, clock[stage]))
        elif type(step) in _SEND_OF:
            key = (step.peer, stage, _SEND_OF[type(step)], step.microbatch, step.chunk)
            if key not in sent:
                return False
            clock[stage] = max(clock[stage], sent[key])
        else:
            sent[stage, step.peer, type(step), step.microbatch, step.chunk] = clock[stage] + transfer
        return True

    while any(place < len(program) for place, program in zip(at, programs, strict=True)):
        for stage, program in enumerate(programs):
            while at[stage] < len(program) and execute(stage, program[at[stage]]):
                at[stage] += 1
    return intervals


def makespan(intervals: Sequence[Interval]) -> float:
    """Return the time from the first start to the last stop.

    Parameters
    ----------
    intervals : sequence of Interval
        What `simulate` returned.

    Returns
    -------
    float
        Time in the unit of the costs.
    """
    return max(one.stop for one in intervals) - min(one.start for one in intervals)
