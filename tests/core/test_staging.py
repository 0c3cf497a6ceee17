"""MPI gets a device's buffers in stream order, staged where it must be, and pinned memory is reused safely."""

import gc

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, comm, from_global, linalg
from colossal_mpi.comm import collectives, staging
from colossal_mpi.grid import Grid as _Grid
from colossal_mpi.platform import backend
from colossal_mpi.testing import fake
from colossal_mpi.testing.fake import FakeStreamError, stream
from tests.cases import integers, represents

TWO = {"row": 2, "col": 2}
AXES = ("row", "col")
PATHS = pytest.mark.parametrize("aware", [False, True], ids=["staged", "aware"])


@pytest.fixture
def on_device(grid, monkeypatch):
    """Return a function that makes a grid on the fake device, whose MPI reads device memory or not."""
    fake.install()

    def make(aware):
        monkeypatch.setenv("COLOSSAL_MPI_CUDA_AWARE", str(int(aware)))
        return Grid(device="fake", **grid.axes)

    return make


CALLS = {
    "allgather": lambda x, grid: comm.allgather(x[:6], grid, AXES, [6] * 4),
    "reduce_scatter": lambda x, grid: comm.reduce_scatter(x, grid, AXES, [6, 0, 5, 13]),
    "allreduce": lambda x, grid: comm.allreduce(x, grid, AXES),
    "swap": lambda x, grid: comm.allreduce(x, grid, ("row",)),
    "all_to_all": lambda x, grid: comm.all_to_all(x, grid, AXES, [6] * 4, [6] * 4, 24),
    "pairwise": lambda x, grid: comm.all_to_all(x, grid, AXES, [6] * 4, [6] * 4),
    "bcast": lambda x, grid: comm.bcast(x, grid, AXES, 2),
}
on_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.mark.grids(TWO)
@PATHS
@on_calls
@pytest.mark.parametrize("large", [1, 1 << 30], ids=["large", "small"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_collective_on_the_device_is_that_on_the_host(grid, on_device, monkeypatch, aware, call, large, dtype):
    monkeypatch.setattr(collectives, "_LARGE", large)
    there, mine = on_device(aware), integers(24, dtype, grid.rank)
    x = there.xp.asarray(mine) * 2 - there.xp.asarray(mine)  # kernels under way when the collective starts
    result = call(x, there)
    assert type(result) is type(x)
    assert np.array_equal(backend.to_host(result + result), 2 * call(mine, grid))


class Watched:
    """A communicator that lets a test look at every buffer before MPI has it."""

    def __init__(self, comm, look):
        self._comm, self._look = comm, look

    def __getattr__(self, name):
        found = getattr(self._comm, name)
        if not (callable(found) and name[0].isupper()):
            return found

        def call(*args):
            for arg in args:
                if isinstance(arg, list) and arg and hasattr(arg[0], "dtype"):
                    self._look(arg[0])
            return found(*args)

        return call


@pytest.mark.grids(TWO)
@PATHS
@on_calls
def test_the_stream_is_idle_whenever_mpi_has_a_buffer(grid, on_device, monkeypatch, aware, call):
    there, seen = on_device(aware), []
    x = there.xp.asarray(integers(24)) + 1
    plain = _Grid.comm

    def look(buffer):
        seen.append((type(buffer), stream.busy))

    monkeypatch.setattr(_Grid, "comm", lambda self, axes: Watched(plain(self, axes), look))
    stream.events.clear()
    call(x, there)
    assert {kind for kind, _ in seen} == {type(x) if aware else np.ndarray}
    receives_into_host_memory = not aware and call is CALLS["bcast"] and grid.rank != 2
    assert receives_into_host_memory or not any(busy for _, busy in seen)
    events = list(stream.events)
    if aware:
        first = events.index("given to MPI")
        assert events[first - 1] == "synchronised"
        assert not any(event.startswith("copy") for event in events)
    else:
        assert receives_into_host_memory or events[events.index("copy to host") + 1] == "synchronised"
        assert "given to MPI" not in events


@pytest.mark.grids(TWO)
@on_calls
def test_what_was_staged_is_on_the_device_before_it_is_used(grid, on_device, call):
    there = on_device(False)
    x = there.xp.asarray(integers(24)) + 1
    call(x, there)  # fills the pool
    stream.events.clear()
    call(x, there)
    events = list(stream.events)
    for place in (i for i, event in enumerate(events) if event == "copy to device"):
        assert events[place + 1] == "synchronised"  # before its pinned buffer can be handed out again


@pytest.mark.grids({"row": 2})
def test_mpi_is_never_given_memory_that_a_kernel_may_still_touch(grid, on_device):
    there = on_device(True)
    block = there.xp.asarray(np.ones(3)) + 1
    with pytest.raises(FakeStreamError, match="before the stream is idle"):
        _ = block.__cuda_array_interface__
    backend.synchronize(block)
    assert block.__cuda_array_interface__["shape"] == (3,)


@pytest.mark.grids({"row": 2})
def test_blocks_refuse_to_reach_numpy_pickle_or_an_mpi_that_cannot_read_them(grid, on_device):
    block = on_device(False).xp.asarray(np.ones(3))
    for reach in (np.asarray, lambda x: np.ones(3) + x, lambda x: x + np.ones(3), lambda x: MPI.COMM_SELF.bcast(x)):
        with pytest.raises(TypeError):
            reach(block)
    with pytest.raises(AttributeError, match="not in the array API"):
        backend.namespace(block).nan_to_num(block)


@pytest.mark.grids(TWO)
@PATHS
def test_a_product_chain_runs_on_the_device(grid, on_device, aware):
    there, a, b = on_device(aware), integers((7, 5), seed=1), integers((5, 9), seed=2)
    x, y = from_global(a, there, Layout("row", "col")), from_global(b, there, Layout("col", "row"))
    product = (x @ y).redistribute(Layout(("col", "row"), None)) * 2
    assert represents(product, 2 * (a @ b))
    assert linalg.norm(product, "max") == np.max(abs(2 * a @ b))


def test_pinned_memory_is_used_again_only_when_nothing_refers_to_it():
    device = fake.FakeDevice()
    pool = staging.Pool(device)
    first = pool.array(1000, "float64")
    second = pool.array(1000, "float64")
    assert device.allocations == 2
    assert not np.shares_memory(first, second)
    view = first[10:20].reshape(2, 5)
    del first
    third = pool.array(900, "float64")  # of the same size class
    assert device.allocations == 3
    assert not np.shares_memory(third, view)
    place = view.ctypes.data
    del view, third
    again = [pool.array(1000, "float64") for _ in range(2)]
    assert device.allocations == 3
    assert any(0 <= place - x.ctypes.data < x.nbytes for x in again)


def test_pinned_memory_is_not_handed_out_while_a_request_is_under_way():
    device = fake.FakeDevice()
    pool = staging.Pool(device)
    request = MPI.COMM_SELF.Irecv([pool.array(4, "float64"), MPI.DOUBLE], 0, 9)
    gc.collect()
    others = [pool.array(4, "float64") for _ in range(3)]
    assert device.allocations == 4
    for other in others:
        other[:] = 1.0
    MPI.COMM_SELF.Send([np.arange(4.0), MPI.DOUBLE], 0, 9)
    request.Wait()
    del request
    back = pool.array(4, "float64")  # MPI wrote to it, and to no other buffer
    assert device.allocations == 4
    assert np.array_equal(back, np.arange(4.0))
    assert all(np.array_equal(other, np.ones(4)) for other in others)


def test_idle_pinned_memory_is_bounded_and_what_was_used_longest_ago_goes():
    device = fake.FakeDevice()
    pool = staging.Pool(device, limit=3 * 4096)
    sizes = [pool.array(n, "uint8") for n in (4096, 8192, 4096)]
    while sizes:
        sizes.pop(0)
    assert pool.held <= 3 * 4096
    before = device.allocations
    kept = [pool.array(8192, "uint8"), pool.array(4096, "uint8")]
    assert device.allocations == before
    del kept
    assert pool.held == 3 * 4096
    huge = pool.array(1 << 20, "uint8")
    del huge
    assert pool.held <= 3 * 4096


@pytest.mark.grids(TWO)
def test_a_loop_of_collectives_allocates_pinned_memory_once(grid, on_device):
    there = on_device(False)
    x = there.xp.asarray(integers(24))
    for round in range(5):
        for call in CALLS.values():
            call(x, there)
        if round == 0:
            before = fake.device.allocations
    assert fake.device.allocations == before
