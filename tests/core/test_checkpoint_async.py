"""A checkpoint that is written while the arrays change holds the state of one moment, completely or not at all."""

import resource
import threading
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from colossal_mpi import CheckpointError, Layout, checkpoint, comm, random, zeros
from colossal_mpi.checkpoint import async_checkpointer, rank_file
from tests.cases import host


def arrays(grid):
    return {name: random.normal((7, 5), grid, Layout("row", None), 1, name) for name in ("a", "b")}


def loaded(directory, grid):
    into = {name: zeros((7, 5), grid, Layout("row", None)) for name in ("a", "b")}
    checkpoint.load(directory, into, grid)
    return {name: host(array) for name, array in into.items()}


def change(arrays):
    for array in arrays.values():
        array.local[...] = -1.0


@pytest.fixture
def gate(monkeypatch):
    """Return an event that the writing of blocks waits for."""
    opened, write = threading.Event(), rank_file.write_rank_file

    def late(*arguments):
        assert opened.wait(30)
        return write(*arguments)

    monkeypatch.setattr(rank_file, "write_rank_file", late)
    yield opened
    opened.set()


@pytest.mark.grids({"row": 2}, {"row": 8})
def test_what_is_saved_is_the_state_at_the_beginning(grid, shared_path, gate):
    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    exact = {name: host(array).copy() for name, array in state.items()}
    done = []
    saving.begin(shared_path / "one", state, {}, after=lambda: done.append(grid.rank))
    saving.settle()
    change(state)
    saving.poll()
    assert not (shared_path / "one").exists()
    gate.set()
    saving.finish()
    assert all(np.array_equal(array, exact[name]) for name, array in loaded(shared_path / "one", grid).items())
    assert done == ([0] if grid.rank == 0 else [])
    saving.begin(shared_path / "two", state, {})
    saving.begin(shared_path / "three", state, {})  # after the second
    saving.finish()
    saving.finish()
    for name in ("two", "three"):
        assert all((array == -1).all() for array in loaded(shared_path / name, grid).values())
    assert saving.stalled > 0


@pytest.mark.grids({"row": 3})
def test_polling_alone_makes_it_whole(grid, shared_path):
    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    saving.begin(shared_path / "one", state, {})
    while not all(comm.collect((shared_path / "one").exists(), grid)):
        saving.poll()
    saving.poll()
    loaded(shared_path / "one", grid)
    saving.finish()


def go_on(saving, moment, directory, state):
    if moment == "begin":
        saving.begin(directory, state, {})
    elif moment == "finish":
        saving.finish()
    else:
        while True:
            saving.poll()


@pytest.mark.grids({"row": 2})
@pytest.mark.parametrize("moment", ["poll", "begin", "finish"])
def test_an_error_of_one_rank_is_raised_on_all_and_leaves_nothing(grid, shared_path, monkeypatch, moment):
    def full(*_):
        raise OSError(28, "No space left on device")

    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    if grid.rank == 1:
        monkeypatch.setattr(rank_file, "_write_blocks", full)
    saving.begin(shared_path / "one", state, {})
    with pytest.raises(CheckpointError, match=r"rank00001.h5 cannot be written: No space left on device; it needs"):
        go_on(saving, moment, shared_path / "two", state)
    comm.collect(None, grid)
    assert not list(shared_path.iterdir())
    monkeypatch.undo()
    saving.begin(shared_path / "one", state, {})
    saving.finish()
    loaded(shared_path / "one", grid)


@pytest.mark.grids({"row": 2})
def test_a_rank_without_memory_for_copies_is_an_error_of_all_and_leaves_nothing(grid, shared_path, monkeypatch):
    def refuse(*_):
        raise MemoryError("Unable to allocate 9 TiB")

    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    if grid.rank == 1:
        monkeypatch.setattr(async_checkpointer, "_empty_copies", refuse)
    with pytest.raises(CheckpointError, match="Unable to allocate 9 TiB"):
        saving.reserve(state)
    with pytest.raises(CheckpointError, match="Unable to allocate 9 TiB"):
        saving.begin(shared_path / "one", state, {})
    saving.poll()
    comm.collect(None, grid)
    assert not list(shared_path.iterdir())
    monkeypatch.undo()
    saving.begin(shared_path / "one", state, {})
    saving.finish()
    loaded(shared_path / "one", grid)


@pytest.mark.grids({"row": 2})
def test_memory_reserved_is_that_of_the_copies(grid, shared_path, monkeypatch):
    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    exact = {name: host(array).copy() for name, array in state.items()}
    saving.reserve(state)
    monkeypatch.setattr(async_checkpointer, "_empty_copies", None)  # no further memory may be allocated
    for name in ("one", "two"):
        saving.begin(shared_path / name, state, {})
        saving.finish()
        assert all(np.array_equal(array, exact[which]) for which, array in loaded(shared_path / name, grid).items())


@pytest.mark.grids({"row": 3})
def test_polling_waits_for_no_rank_that_is_late(grid, shared_path, gate):
    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    saving.begin(shared_path / "one", state, {})
    comm.collect(None, grid)
    for turn in range(2):
        went_on, deadline = shared_path / f"went on {turn}", time.monotonic() + 30
        if grid.rank == 0:
            saving.poll()
            went_on.touch()
        while not went_on.exists():  # the other ranks poll later than rank 0
            assert time.monotonic() < deadline, "poll waits for the other ranks"
            time.sleep(0.001)
        if grid.rank != 0:
            saving.poll()
        comm.collect(None, grid)
    gate.set()
    saving.finish()
    loaded(shared_path / "one", grid)


def point(directory):
    return lambda: checkpoint.point_latest(directory)


@contextmanager
def files_of_at_most(size):
    """Limit the size of files that this process can write, as a full file system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.grids({"row": 2})
@pytest.mark.parametrize(("rank", "size"), [(1, 0), (1, 400), (1, 900), (0, 4000)])
def test_a_full_disk_is_one_error_at_any_byte_and_latest_stays_good(grid, shared_path, rank, size):
    state, saving = arrays(grid), checkpoint.AsyncCheckpointer(grid)
    saving.begin(shared_path / "one", state, {}, after=point(shared_path / "one"))
    saving.finish()
    with files_of_at_most(size) if grid.rank == rank else nullcontext():
        with pytest.raises(CheckpointError, match=r"\S+ cannot be written: File too large; .*bytes are free"):
            checkpoint.save(shared_path / "two", state, {}, grid)
        saving.begin(shared_path / "two", state, {}, after=point(shared_path / "two"))
        with pytest.raises(CheckpointError, match=r"\S+ cannot be written: File too large; .*bytes are free"):
            go_on(saving, "poll", None, None)
        comm.collect(None, grid)
    assert sorted(path.name for path in shared_path.iterdir()) == ["latest", "one"]
    loaded(shared_path / "latest", grid)


@pytest.mark.grids({"row": 2})
def test_an_error_after_it_is_whole_is_raised_and_leaves_it(grid, shared_path):
    def after():
        raise OSError(30, "Read-only file system")

    saving = checkpoint.AsyncCheckpointer(grid)
    saving.begin(shared_path / "one", arrays(grid), {}, after=after)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        saving.finish()
    loaded(shared_path / "one", grid)
