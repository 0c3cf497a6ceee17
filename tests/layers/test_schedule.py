"""Every pipeline schedule is sound, and takes the time and the memory of its closed form."""

import itertools

import pytest

from colossal_mpi import OptionError, ScheduleError
from colossal_mpi.layers.pipeline import makespan, simulate, verify
from colossal_mpi.layers.pipeline.partition import balanced_ranges
from colossal_mpi.layers.pipeline.schedule import (
    BackwardInput,
    BackwardWeight,
    Forward,
    ReceiveActivation,
    SendActivation,
    SendGradient,
    Transfer,
    program,
)

KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1)]
each_kind = pytest.mark.parametrize(("schedule", "chunks"), KINDS, ids=lambda x: str(x))
F, B, W = 1, 1, 1
EVEN = [(p, m) for p in (1, 2, 3, 4, 6, 8) for m in (2 * p, 3 * p, 5 * p)]


def programs(schedule, stages, microbatches, chunks=1):
    return [list(program(schedule, stages, microbatches, stage, chunks)) for stage in range(stages)]


def costs(f=F, b=B, w=W, chunks=1):
    return lambda step, stage: {Forward: f, BackwardInput: b, BackwardWeight: w}[type(step)] / chunks


@each_kind
def test_any_number_of_stages_and_microbatches_is_sound(schedule, chunks):
    for stages, microbatches in itertools.product(range(1, 7), range(1, 14)):
        made = programs(schedule, stages, microbatches, chunks)
        proof = verify(made)
        assert verify(made, proof.in_flight) == proof
        computed = [step for step in made[-1] if not isinstance(step, Transfer)]
        assert len(computed) == 3 * microbatches * chunks


@pytest.mark.parametrize(("schedule", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_the_bubble_of_whole_backward_passes(schedule, chunks):
    """The papers count input and weight part as one; sending cotangents between the two saves (p - 1) W."""
    for p, m in EVEN:
        made = programs(schedule, p, m, chunks)
        whole = makespan(simulate(made, costs(F, B + W, 0, chunks)))
        assert whole == pytest.approx(m * (F + B + W) + (p - 1) * (F + B + W) / chunks, rel=1e-12)
        split = makespan(simulate(made, costs(chunks=chunks)))
        assert split == pytest.approx(m * (F + B + W) + (p - 1) * (F + B) / chunks, rel=1e-12)


def test_the_bubble_of_zb_h1():
    for p, m in EVEN:
        assert makespan(simulate(programs("zero-bubble", p, m), costs())) == m * (F + B + W) + (p - 1) * (F + B - W)


def test_live_caches():
    for p, m in [*EVEN, (4, 2), (5, 3)]:
        assert verify(programs("gpipe", p, m)).live == [m] * p
        assert verify(programs("1f1b", p, m)).live == [min(m, p - i) for i in range(p)]
    for p, m in EVEN:
        assert verify(programs("zero-bubble", p, m)).live == [p] * p
        assert verify(programs("interleaved", p, m, 3)).live[0] == 3 * p + p - 1


def by_ticks(made, cost, transfer):
    """Return the makespan by stepping a clock by one; every cost is a whole number of ticks."""
    at, busy, clock, arrivals = [0] * len(made), [0] * len(made), 0, {}
    while any(place < len(steps) for place, steps in zip(at, made, strict=True)):
        moved = True
        while moved:
            moved = False
            for stage, steps in enumerate(made):
                if busy[stage] > clock or at[stage] == len(steps):
                    continue
                step = steps[at[stage]]
                name = type(step).__name__.replace("Receive", "Send")
                if not isinstance(step, Transfer):
                    busy[stage] = clock + cost(step, stage)
                elif name == type(step).__name__:
                    arrivals[name, stage, step.peer, step.microbatch, step.chunk] = clock + transfer
                elif arrivals.get((name, step.peer, stage, step.microbatch, step.chunk), clock + 1) > clock:
                    continue
                at[stage] += 1
                moved = True
        clock += 1
    return max(busy)


@each_kind
@pytest.mark.parametrize("transfer", [0, 2])
def test_times_equal_a_clock_that_ticks(schedule, chunks, transfer):
    def cost(step, stage):
        return {Forward: 2, BackwardInput: 3, BackwardWeight: 1}[type(step)] + (stage + step.microbatch) % 3

    for p, m in itertools.product((1, 2, 3, 5), (1, 4, 7)):
        made = programs(schedule, p, m, chunks)
        assert makespan(simulate(made, cost, transfer)) == by_ticks(made, cost, transfer)


def without(steps, kind, number=0):
    at = [i for i, step in enumerate(steps) if type(step) is kind][number]
    return steps[:at] + steps[at + 1 :]


def test_what_is_wrong_is_named():
    made = programs("1f1b", 3, 4)
    swapped = made[1].copy()
    first, second = [i for i, step in enumerate(swapped) if type(step) is ReceiveActivation][:2]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    for stage, steps, message in [
        (0, without(made[0], SendActivation), "comes where stage 0 sends"),
        (2, without(made[2], SendGradient, 3), "the schedule never ends: stage 0 waits"),
        (1, without(made[1], ReceiveActivation, 3), "which never receives it"),
        (1, without(made[1], BackwardWeight), "has no whole backward pass"),
        (1, without(made[1], Forward), "comes out of its order"),
        (1, swapped, "comes where stage 0 sends"),
    ]:
        with pytest.raises(ScheduleError, match=message):
            verify([steps if i == stage else other for i, other in enumerate(made)])
    with pytest.raises(ScheduleError, match="never ends"):
        verify(made, 0)


@pytest.mark.parametrize("options", [("1f1b", 2, 4, 0, 2), ("interleaved", 2, 4, 0, 1), ("gpipe", 0, 4, 0, 1)])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(OptionError, match="2 virtual stages or more for 'interleaved' and 1 for the others"):
        list(program(*options))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(OptionError, match="schedule='zb': use one of 'gpipe', '1f1b'"):
        list(program("zb", 2, 4, 0))


@pytest.mark.parametrize("costs", [[3, 1, 1, 1, 1, 1, 9], [1] * 7, [0, 5, 0, 0, 2, 2], [4]], ids=str)
def test_layers_are_cut_as_evenly_as_can_be(costs):
    for parts in range(1, len(costs) + 1):
        cut = balanced_ranges(costs, parts)
        assert [i for piece in cut for i in piece] == list(range(len(costs)))
        assert all(len(piece) for piece in cut)
        best = min(
            max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *places, len(costs))))
            for places in itertools.combinations(range(1, len(costs)), parts - 1)
        )
        assert max(sum(costs[i] for i in piece) for piece in cut) == best
    with pytest.raises(OptionError, match=f"{len(costs)} layers cannot be cut into {len(costs) + 1} parts"):
        balanced_ranges(costs, len(costs) + 1)
