"""h5py and any grid in any layout read the saved datasets, and all ranks raise the same errors."""

import array_api_strict
import h5py
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import (
    CheckpointError,
    DistArray,
    DTypeError,
    Grid,
    Layout,
    LayoutError,
    comm,
    from_global,
    ledger,
    zeros,
)
from colossal_mpi.linalg import load, save
from colossal_mpi.redistribution import gather
from tests.cases import host, integers, layouts, refusal, represents, some, spread, totals

ONE, LINE, SQUARE, WIDE = {}, {"col": 3}, {"row": 2, "col": 2}, {"row": 2, "col": 3}
DTYPES = ("float16", "float32", "float64", "complex64", "complex128", "int8", "int64", "uint16")


@pytest.mark.grids(ONE, LINE, SQUARE, WIDE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_h5py_reads_what_was_saved_and_any_layout_loads_it(grid, shared_path, dtype):
    file = shared_path / "deep" / "one.h5"
    for shape in [(7, 5), (1, 9), (0, 3)]:
        whole = abs(integers(shape, "int64")).astype(dtype)
        for number, layout in enumerate(some(layouts(2, grid.axes, dtype != "float16"), 4)):
            name = f"{dtype}/{shape[0]}/{number}"
            save(file, name, spread(whole, grid, layout))
            with h5py.File(file, "r") as opened:
                assert np.array_equal(opened[name][...], whole)
                assert opened[name].dtype == dtype
            other = load(file, name, grid, layouts(2, grid.axes)[-number - 1])
            assert represents(other, whole), layout


@pytest.mark.grids(ONE, SQUARE)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)], ids=str)
def test_any_number_of_dims(grid, shared_path, shape):
    whole = integers(shape)
    layout = Layout(*[*grid.axes, None, None, None][: len(shape)])
    save(shared_path / "one.h5", "x", from_global(np.asarray(whole), grid, layout))
    assert represents(load(shared_path / "one.h5", "x", grid, layout), np.asarray(whole))


@pytest.mark.grids(WIDE)
def test_other_grids_load_it(grid, shared_path):
    whole = integers((7, 9))
    save(shared_path / "one.h5", "x", from_global(whole, grid, Layout("row", "col")))
    with Grid(all=6) as line:
        assert represents(load(shared_path / "one.h5", "x", line, Layout(None, "all")), whole)
    alone = Grid(MPI.COMM_SELF)
    assert np.array_equal(host(load(shared_path / "one.h5", "x", alone, Layout(None, None))), whole)


@pytest.mark.grids(SQUARE)
def test_files_of_others_are_read(grid, shared_path):
    whole = integers((6, 5))
    if grid.rank == 0:
        with h5py.File(shared_path / "theirs.h5", "w") as file:
            file.create_dataset("a/big-endian", data=whole.astype(">f8"), chunks=(2, 2), compression="gzip")
    comm.collect(None, grid)
    made = load(shared_path / "theirs.h5", "a/big-endian", grid, Layout("row", "col"))
    single = load(shared_path / "theirs.h5", "a/big-endian", grid, Layout(None, "col"), "float32")
    assert made.dtype == np.float64
    assert made.dtype.isnative
    assert single.dtype == np.float32
    assert represents(made, whole)
    assert represents(single, whole)


@pytest.mark.grids(LINE, WIDE)
def test_rank_0_receives_pieces_of_bounded_size_once(grid, shared_path, monkeypatch):
    monkeypatch.setattr(gather, "PIECE", 12)
    whole = integers((13, 5))
    for layout in some(layouts(2, grid.axes, False), 6):
        a = from_global(whole, grid, layout)
        with ledger.record() as moved:
            save(shared_path / "one.h5", "x", a, overwrite=True)
        assert all(event.words <= 12 for event in moved.events)
        assert totals([moved.words], grid)[0] == whole.size - totals([a.local.size * (grid.rank == 0)], grid)[0]
        with h5py.File(shared_path / "one.h5", "r") as opened:
            assert np.array_equal(opened["x"][...], whole)
        comm.collect(None, grid)


@pytest.mark.grids(SQUARE)
def test_blocks_need_not_be_numpy(grid, shared_path):
    whole = integers((7, 5))
    a = from_global(whole, grid, Layout("row", "col"))
    save(shared_path / "one.h5", "x", DistArray(array_api_strict.asarray(host(a)), a.shape, a.layout, grid))
    assert represents(load(shared_path / "one.h5", "x", grid, Layout("col", None)), whole)


@pytest.mark.grids(SQUARE)
def test_what_cannot_be_read_is_the_same_error_on_all_ranks(grid, shared_path):
    good, bad = shared_path / "good.h5", shared_path / "bad.h5"
    save(good, "group/x", zeros((4, 6), grid, Layout("row", "col")))
    if grid.rank == 0:
        bad.write_bytes(b"no HDF5 at all")
        with h5py.File(good, "a") as file:
            file["text"] = "words"
    comm.collect(None, grid)
    lay = Layout("row", "col")
    for call, kind, message in [
        (lambda: load(shared_path / "none.h5", "x", grid, lay), CheckpointError, "none.h5: 'x' cannot be read"),
        (lambda: load(bad, "x", grid, lay), CheckpointError, "bad.h5 cannot be read as HDF5"),
        (lambda: load(good, "x", grid, lay), CheckpointError, "has no dataset 'x'; there are group/x, text"),
        (lambda: load(good, "group", grid, lay), CheckpointError, "has no dataset 'group'"),
        (lambda: load(good, "text", grid, Layout()), DTypeError, "text is of dtype object; it must hold numbers"),
        (lambda: load(good, "group/x", grid, Layout("row")), LayoutError, "1 dims for an array of 2"),
        (lambda: load(good, "group/x", grid, Layout("depth", None)), LayoutError, "no axis 'depth' on this grid"),
        (lambda: load(good, "", grid, lay), CheckpointError, "cannot name an array in HDF5"),
    ]:
        raised, text = refusal(call, grid)
        assert raised is kind
        assert message in text


@pytest.mark.grids(SQUARE)
def test_what_cannot_be_written_is_the_same_error_on_all_ranks(grid, shared_path):
    file, bad = shared_path / "one.h5", shared_path / "bad.h5"
    a = zeros((4, 6), grid, Layout("row", "col"))
    save(file, "x/y", a)
    if grid.rank == 0:
        bad.write_bytes(b"no HDF5 at all")
    comm.collect(None, grid)
    text_like = DistArray(host(a).astype("U1"), a.shape, a.layout, grid)
    for call, kind, message in [
        (lambda: save(file, "x/y", a), CheckpointError, "has 'x/y' already: choose another name, or overwrite=True"),
        (lambda: save(file, "x/y/z", a), CheckpointError, "one.h5: "),
        (lambda: save(file, "x", a, overwrite=True), CheckpointError, "has 'x' already"),  # a group of datasets
        (lambda: save(file, "x//y", a), CheckpointError, "cannot name an array in HDF5"),
        (lambda: save(bad, "x", a), CheckpointError, "bad.h5 cannot be written as HDF5"),
        (lambda: save(bad / "below", "x", a), CheckpointError, "bad.h5"),
        (lambda: save(file, "text", text_like), DTypeError, "HDF5 has no type for <U1"),
    ]:
        raised, text = refusal(call, grid)
        assert raised is kind
        assert message in text
    save(file, "x/y", a + 1, overwrite=True)
    assert represents(load(file, "x/y", grid, Layout(None, None)), np.ones((4, 6)))


@pytest.mark.grids(SQUARE)
def test_a_failure_while_writing_leaves_no_rank_waiting_and_no_dataset(grid, shared_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save(shared_path / "one.h5", "kept", zeros((2, 2), grid, Layout(None, None)))
    with monkeypatch.context() as patch:
        patch.setattr(h5py.Dataset, "__setitem__", full)
        kind, text = refusal(lambda: save(shared_path / "one.h5", "x", zeros((4, 6), grid, Layout("row", "col"))), grid)
    assert kind is CheckpointError
    assert "one.h5 cannot be written: No space left on device" in text
    with h5py.File(shared_path / "one.h5", "r") as opened:
        assert list(opened) == ["kept"]
