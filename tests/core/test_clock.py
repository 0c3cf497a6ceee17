"""The clock of a machine predicts the times of operations and messages in dry runs."""

import math

import pytest

from colossal_mpi import Grid, comm, ledger, meta
from colossal_mpi.comm import start_exchange
from colossal_mpi.machine import Clock, Link, Machine

NEAR, FAR = Link(1.0, 10.0), Link(5.0, 2.0)
MACHINE = Machine(flops=100.0, memory=50.0, call=0.5, product=2.0, near=NEAR, far=FAR, ranks_per_node=4, overlap=False)
AXES = {"data": 2, "row": 2, "col": 2}


@pytest.mark.parametrize(
    ("axes", "rank", "link"),
    [
        (("col",), 0, NEAR),
        (("row", "col"), 5, NEAR),
        (("data",), 3, FAR),
        (("data", "col"), 1, FAR),
        ((), 7, NEAR),
    ],
)
def test_consecutive_ranks_share_a_node(axes, rank, link):
    assert MACHINE.link(axes, AXES, Grid.meta(rank, **AXES).coords) is link


def test_a_group_that_lies_across_a_border_of_nodes_is_far():
    assert MACHINE.link(("row",), {"data": 2, "row": 3}, {"data": 0, "row": 0}) is NEAR
    assert MACHINE.link(("row",), {"data": 2, "row": 3}, {"data": 1, "row": 0}) is FAR


@pytest.mark.parametrize(
    ("op", "ranks", "seconds"), [("allgather", 8, 3 + 2), ("receive", 8, 1 + 2), ("allreduce", 5, 3 + 2)]
)
def test_messages_take_latency_and_bytes(op, ranks, seconds):
    assert MACHINE.seconds(op, ranks, 20, NEAR) == seconds


def planned(machine):
    grid = Grid.meta(**AXES)
    return grid, Clock(machine, grid.axes, grid.coords)


def test_operations_and_messages_take_their_time():
    (grid, clock), wall = planned(MACHINE), ledger.clock
    with meta.tally(clock), ledger.timed_by(clock):
        assert ledger.clock is clock
        x = grid.xp.ones((100,), dtype=grid.xp.float32)
        assert clock.now() == 0.5 + 400 / 50
        before = clock.now()
        meta.work(1000, x)
        assert clock.now() - before == 0.5 + 2.0 + 1000 / 100  # arithmetic takes longer than 400 bytes
        with ledger.record() as rec, ledger.span("forward"):
            comm.allgather(x, grid, ("col",), [100, 100])
        assert rec.seconds == 1 + 400 / 10
        assert rec.spans[0].ended - rec.spans[0].begun >= rec.seconds
    assert ledger.clock is wall


@pytest.mark.parametrize("overlap", [True, False])
def test_messages_under_way_are_hidden_by_computation_where_the_machine_can(overlap):
    machine = Machine(100.0, math.inf, 0.0, 0.0, NEAR, FAR, 4, overlap)
    grid, clock = planned(machine)
    with meta.tally(clock), ledger.timed_by(clock), ledger.record() as rec:
        own, other = (grid.xp.empty((100,), dtype=grid.xp.float32) for _ in range(2))
        pending = start_exchange(grid, ("col",), [(1, own)], [(1, other)])
        assert pending.done() is not overlap
        meta.work(2000, own)  # 20 of the 41 seconds
        pending.wait()
        second = start_exchange(grid, ("col",), [(1, own)], [(1, other)])
        meta.work(10_000, own)
        assert second.done()
    exposed = [event.seconds for event in rec.events]
    assert exposed == ([21.0, 0.0] if overlap else [41.0, 41.0])
