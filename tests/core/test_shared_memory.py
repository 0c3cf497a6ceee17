"""The arena allocates, merges and returns its memory, and the ranks of a node read each other's blocks in it."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

from colossal_mpi import Grid, Layout, comm, from_global, ledger
from colossal_mpi.comm import reading
from colossal_mpi.platform import shared_memory
from colossal_mpi.redistribution import execute
from tests.cases import integers

MIB = 1 << 20


@pytest.fixture
def arena():
    return shared_memory.Arena()


def spans(arena):
    return [(offset // shared_memory._PAGE, length // shared_memory._PAGE) for offset, length in arena._free]


def test_spans_are_given_out_in_order_and_merged_when_they_come_back(arena):
    end = arena.size // shared_memory._PAGE
    one, two, three = (arena.take(n * shared_memory._PAGE) for n in (1, 2, 3))
    assert spans(arena) == [(7, end - 7)]
    del two
    assert spans(arena) == [(2, 2), (7, end - 7)]
    del one
    assert spans(arena) == [(1, 3), (7, end - 7)]
    again = arena.take(3 * shared_memory._PAGE - 1)
    assert spans(arena) == [(7, end - 7)]
    del three, again
    assert spans(arena) == [(1, end - 1)]


def test_memory_lives_as_long_as_the_last_view(arena):
    array = arena.take(MIB).array((4, 5), "float64")
    view = array[1:, ::2]
    view[...] = 7
    del array
    gc.collect()
    assert arena.take(MIB)._offset > shared_memory._PAGE
    assert (view == 7).all()
    del view
    assert arena.take(MIB)._offset == shared_memory._PAGE


def test_what_comes_back_in_the_middle_of_a_take_is_kept_for_the_next(arena):
    span = arena.take(MIB)
    with arena._lock:
        del span
        assert len(arena._returned) == 1
    assert arena.take(MIB)._offset == shared_memory._PAGE
    assert not arena._returned


def test_much_free_memory_goes_back_to_the_system(arena, monkeypatch):
    monkeypatch.setattr(shared_memory, "_KEEP", 8 * MIB)
    span = arena.take(16 * MIB)
    span.array((16 * MIB,), "uint8")[...] = 1
    assert os.fstat(arena.file).st_blocks * 512 >= 16 * MIB
    del span
    assert os.fstat(arena.file).st_blocks * 512 < MIB


def test_a_full_arena_gives_nothing(arena):
    whole = arena.take(arena.size - shared_memory._PAGE)
    assert arena.take(1) is None
    del whole


def test_small_blocks_lie_in_ordinary_memory():
    assert shared_memory.describe(shared_memory.empty((MIB // 8 - 1,), "float64"))[0] == -1
    assert shared_memory.describe(shared_memory.empty((MIB // 8,), "float64"))[0] > 0


def test_another_process_reads_what_lies_there(arena, monkeypatch):
    array = arena.take(MIB).array((6, 7), "int64")
    array[...] = np.arange(42).reshape(6, 7)
    code = (
        "import sys; from colossal_mpi.platform import shared_memory;"
        "process, file, size, key, start, *strides = sys.argv[1:];"
        "m = shared_memory.mapped(shared_memory.Address(int(process), int(file), int(size), bytes.fromhex(key)));"
        "print(m if m is None else shared_memory.view(m, (2, 6), 'int64', [int(start), *map(int, strides)]).tolist())"
    )
    part = array.T[1:3]
    where = [os.getpid(), arena.file, arena.size, arena.key.hex(), arena.offset(part), *part.strides]
    read = subprocess.run([sys.executable, "-c", code, *map(str, where)], capture_output=True, text=True, timeout=60)
    assert read.stdout.strip() == str(part.tolist())
    where[3] = "00" * 16
    other = subprocess.run([sys.executable, "-c", code, *map(str, where)], capture_output=True, text=True, timeout=60)
    assert other.stdout.strip() == "None"


def test_the_word_of_the_user_turns_it_off(monkeypatch):
    monkeypatch.setenv("COLOSSAL_MPI_SHARED", "0")
    assert not Grid().shares


@pytest.mark.smoke
@pytest.mark.grids({"x": 3}, {"x": 2, "y": 2})
@pytest.mark.parametrize("lies", ["arena", "elsewhere", "turned"])
def test_neighbours_read_each_others_blocks(grid, lies):
    axes = tuple(grid.axes)
    if grid.peers(axes) is None:
        return  # simulated nodes, or a device
    make = shared_memory.arena().take(MIB).array if lies == "arena" else np.empty
    block = make((grid.rank + 1, 4), "float64")
    block[...] = grid.rank + np.arange(4)
    shapes = [(r + 1, 4) for r in range(grid.size)]
    if lies == "turned":
        block, shapes = block.T[::-1], [shape[::-1] for shape in shapes]
    with (
        ledger.record() as moved,
        reading(block, grid, axes, shapes, 12) as blocks,
    ):
        sums = [float(x.sum()) for x in blocks]
    assert sums == [(r + 1) * (4 * r + 6.0) for r in range(grid.size)]
    assert [(event.op, event.words, event.bytes) for event in moved.events] == [("read", 12, 96)]
    assert lies != "arena" or not blocks[grid.rank - 1].flags.writeable


@pytest.mark.smoke
@pytest.mark.grids({"x": 2, "y": 2})
def test_where_one_block_cannot_be_lent_all_get_none_and_moves_go_by_message(grid, monkeypatch):
    if grid.peers(tuple(grid.axes)) is None:
        return
    monkeypatch.setattr(execute, "READ_FROM", 0)
    if grid.rank == 1:
        monkeypatch.setattr(shared_memory.Arena, "take", lambda *_: None)
    whole = integers((7, 5))
    with ledger.record() as moved:
        a = from_global(whole, grid, Layout("x", "y")).redistribute(Layout("y", None))
    assert np.array_equal(
        np.vstack([block for block, c in comm.collect((a.local, grid.coords["x"]), grid) if not c]), whole
    )
    assert {event.op for event in moved.events} == {"all_to_all"}


def test_a_forked_child_does_not_give_back_what_its_parent_uses(monkeypatch):
    monkeypatch.setattr(shared_memory, "_KEEP", MIB)
    array = shared_memory.empty((4 * MIB,), "uint8")
    array[...] = 7
    child = os.fork()
    if child == 0:
        del array
        os._exit(0 if shared_memory.arena()._free != [] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (array == 7).all()
