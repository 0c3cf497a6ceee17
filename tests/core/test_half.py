"""float16 and bfloat16 are sent as 16 bits, summed in float32 and rounded once."""

import numpy as np
import pytest

from colossal_mpi import DistArray, Layout, comm, from_global, ledger
from colossal_mpi.comm import collectives
from colossal_mpi.platform import backend
from tests.cases import host, on

GRIDS = pytest.mark.grids({"x": 2}, {"x": 3})
AXES = ("x",)


@pytest.fixture(params=["float16", "bfloat16"])
def half(request, grid):
    if request.param == "float16":
        return np.dtype("float16")
    if grid.device.startswith("cuda"):
        pytest.skip("CuPy has no bfloat16 arrays")
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def term(half, rank, count=7):
    """Return one rank's numbers; in any order, 16-bit sums lose the small ones next to 512."""
    values = np.full(count, 1.0)
    values[rank % count] = 512.0
    return values.astype(half)


def exact(half, grid):
    return sum(term(half, rank).astype("float32") for rank in range(grid.size)).astype(half)


@GRIDS
@pytest.mark.parametrize("large", [1, 1 << 30], ids=["large", "small"])
def test_sums_are_made_in_float32_and_rounded_once(grid, half, monkeypatch, large):
    monkeypatch.setattr(collectives, "_LARGE", large)
    counts = [4, 3, 0][: grid.size]
    mine = on(grid, term(half, grid.rank))
    piece = host(comm.reduce_scatter(mine, grid, AXES, counts))
    assert piece.dtype == half
    assert np.array_equal(piece, np.split(exact(half, grid), np.cumsum(counts)[:-1])[grid.rank])
    total = host(comm.allreduce(mine, grid, AXES))
    assert total.dtype == half
    assert np.array_equal(total, exact(half, grid))
    top = host(comm.allreduce(mine, grid, AXES, comm.MAX))
    assert np.array_equal(top, np.max([term(half, r) for r in range(grid.size)], axis=0))


@GRIDS
@pytest.mark.parametrize("large", [1, 1 << 30], ids=["large", "small"])
def test_every_bit_is_carried_in_two_bytes(grid, half, monkeypatch, large):
    monkeypatch.setattr(collectives, "_LARGE", large)
    bits = np.random.default_rng(0).integers(0, 1 << 16, 600, dtype=np.uint16)  # infinities and NaN among them
    mine = on(grid, bits.view(half) if grid.rank == 0 else np.zeros(600, half))
    with ledger.record() as moved:
        sent = host(comm.bcast(mine, grid, AXES))
        counts = [600, 0, 0][: grid.size]
        whole = host(comm.allgather(mine if grid.rank == 0 else mine[:0], grid, AXES, counts))
        turned = host(comm.all_to_all(whole_of(grid, sent), grid, AXES, *([[600 // grid.size] * grid.size] * 2), 600))
    assert sent.dtype == whole.dtype == turned.dtype == half
    assert sent.tobytes() == whole.tobytes() == bits.tobytes()
    assert turned.size == 600
    assert moved.bytes == 2 * moved.words


def whole_of(grid, values):
    return on(grid, values)


@GRIDS
def test_arrays_of_it_change_layout_and_dtype(grid, half):
    whole = np.arange(35, dtype="float32").reshape(7, 5)
    array = from_global(whole, grid, Layout("x", None), dtype=half)
    assert backend.numpy_dtype(array.dtype) == half
    assert np.array_equal(array.redistribute(Layout(None, "x")).gather().astype("float32"), whole)
    assert array.astype("float32").dtype == np.float32
    partial = DistArray(on(grid, np.full(4, 256.0).astype(half)), (4,), Layout(None, partial="x"), grid)
    assert np.array_equal(partial.gather().astype("float32"), np.full(4, 256.0 * grid.size))
