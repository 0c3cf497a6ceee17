"""A pipeline schedule proved and timed without MPI.

`check` runs the programs of all stages against one another with bounded buffers; `simulate` gives every computation its
time. Both see nothing but the instructions.
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
Cost = Callable[[Instruction, int], float]
_SENDS = {ReceiveActivation: SendActivation, ReceiveGradient: SendGradient}


@dataclass(frozen=True)
class Proof:
    """What a schedule needs: the greatest numbers of caches alive on each stage and of unreceived messages."""

    live: list[int]
    in_flight: int


@dataclass(frozen=True)
class Span:
    """A computation and its time, in the unit of the costs."""

    stage: int
    step: Instruction
    start: float
    stop: float


def check(programs: Programs, buffers: int | None = None) -> Proof:
    """Prove a schedule, or say where it is wrong.

    Every computation has its forward, input and weight part once and in this order; every receive has its send, in
    the same order between two stages; and the programs come to their end if each stage may have `buffers` messages
    under way to another (None: any number).

    Raises
    ------
    ScheduleError
    """
    live = [_lives(program, stage) for stage, program in enumerate(programs)]
    most = 0
    ends = _Run(programs, buffers)
    while not ends.done:
        before = ends.moved
        for stage in range(len(programs)):
            ends.advance(stage)
        most = max(most, ends.most)
        if ends.moved == before:
            raise ScheduleError("the schedule never ends: " + "; ".join(ends.places()))
    ends.require_empty()
    return Proof(live, most)


def _lives(program: Sequence[Instruction], stage: int) -> int:
    """Return the greatest number of caches alive, and require that F, B and W come once each, in this order."""
    parts = (Forward, BackwardInput, BackwardWeight)
    state: dict[tuple[int, int], int] = {}
    alive = most = 0
    for step in program:
        if not isinstance(step, parts):
            continue
        piece, part = (step.microbatch, step.chunk), parts.index(type(step))
        if state.get(piece, 0) != part:
            raise ScheduleError(f"stage {stage}: {step} comes out of its order: forward, input, weight, once each")
        state[piece] = part + 1
        alive += {0: 1, 1: 0, 2: -1}[part]
        most = max(most, alive)
    if lacking := [piece for piece, part in state.items() if part != len(parts)]:
        raise ScheduleError(f"stage {stage}: (microbatch, chunk) {lacking[0]} has no whole backward pass")
    return most


class _Run:
    """Programs at their places, with the messages between them."""

    def __init__(self, programs: Programs, buffers: int | None) -> None:
        self.programs, self.buffers, self.moved, self.most = programs, buffers, 0, 0
        self.at = [0] * len(programs)
        self.channels: dict[tuple[int, int, type], deque[tuple[int, int]]] = {}
        self.under_way: Counter[tuple[int, int]] = Counter()

    @property
    def done(self) -> bool:
        return all(at == len(program) for at, program in zip(self.at, self.programs, strict=True))

    def advance(self, stage: int) -> None:
        """Go on with a stage until it has to wait."""
        program = self.programs[stage]
        while self.at[stage] < len(program) and self._take(stage, program[self.at[stage]]):
            self.at[stage] += 1
            self.moved += 1

    def _take(self, stage: int, step: Instruction) -> bool:
        if not isinstance(step, Transfer):
            return True
        message = (step.microbatch, step.chunk)
        if type(step) not in _SENDS:
            pair = (stage, step.peer)
            if self.buffers is not None and self.under_way[pair] >= self.buffers:
                return False
            self.channels.setdefault((*pair, type(step)), deque()).append(message)
            self.under_way[pair] += 1
            self.most = max(self.most, self.under_way[pair])
            return True
        pair = (step.peer, stage)
        waiting = self.channels.get((*pair, _SENDS[type(step)]))
        if not waiting:
            return False
        if waiting[0] != message:
            raise ScheduleError(f"stage {stage}: {step} comes where stage {step.peer} sends {waiting[0]} next")
        waiting.popleft()
        self.under_way[pair] -= 1
        return True

    def places(self) -> list[str]:
        """Return where each stage waits."""
        return [
            f"stage {i} waits at {program[at]}"
            for i, (at, program) in enumerate(zip(self.at, self.programs, strict=True))
            if at < len(program)
        ]

    def require_empty(self) -> None:
        """Require that all that was sent was received."""
        for (source, target, _), messages in self.channels.items():
            if messages:
                raise ScheduleError(f"stage {source} sends {messages[0]} to stage {target}, which never receives it")


def simulate(programs: Programs, cost: Cost, transfer: float = 0.0) -> list[Span]:
    """Return when each stage computes what; a message arrives `transfer` after its send, and sends cost nothing.

    Parameters
    ----------
    programs : sequence of sequence of Instruction
        That `check` has passed.
    cost : callable
        Time of a `Forward`, `BackwardInput` or `BackwardWeight` on a stage.
    transfer : float
        Time of a message.
    """
    clock, at = [0.0] * len(programs), [0] * len(programs)
    sent: dict[tuple[int, int, type, int, int], float] = {}
    spans: list[Span] = []

    def run(stage: int, step: Instruction) -> bool:
        if not isinstance(step, Transfer):
            begun = clock[stage]
            clock[stage] += cost(step, stage)
            spans.append(Span(stage, step, begun, clock[stage]))
        elif type(step) in _SENDS:
            key = (step.peer, stage, _SENDS[type(step)], step.microbatch, step.chunk)
            if key not in sent:
                return False
            clock[stage] = max(clock[stage], sent[key])
        else:
            sent[stage, step.peer, type(step), step.microbatch, step.chunk] = clock[stage] + transfer
        return True

    while any(place < len(program) for place, program in zip(at, programs, strict=True)):
        for stage, program in enumerate(programs):
            while at[stage] < len(program) and run(stage, program[at[stage]]):
                at[stage] += 1
    return spans


def makespan(spans: Sequence[Span]) -> float:
    """Return the time from the first start to the last stop."""
    return max(span.stop for span in spans) - min(span.start for span in spans)
