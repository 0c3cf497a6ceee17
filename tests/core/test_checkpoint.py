"""Any grid loads the checkpoints of any other, h5py reads them, and damage is found before anything is loaded."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import CheckpointError, Grid, Layout, checkpoint, comm, random, zeros
from colossal_mpi.checkpoint import rank_file
from tests.cases import host

LAYOUTS = {
    "weights/a": ((7, 5), ("row", "col")),
    "weights/b": ((9,), (None,)),
    "deep/er/c": ((2, 3, 5), ("col", None, "row")),
}


def arrays(grid, empty=False):
    """Return arrays in layouts that use the grid's axes named in LAYOUTS."""
    made = {}
    for name, (shape, dims) in LAYOUTS.items():
        layout = Layout(*[axis if axis in grid.axes else None for axis in dims])
        made[name] = zeros(shape, grid, layout) if empty else random.normal(shape, grid, layout, 1, name)
    return made


@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2}, {"col": 3}, {})
def test_round_trip_is_bitwise(grid, shared_path):
    saved, loaded = arrays(grid), arrays(grid, empty=True)
    checkpoint.save(shared_path / "one", saved, {"step": 3}, grid)
    assert checkpoint.load(shared_path / "one", loaded, grid) == {"step": 3}
    assert all(np.array_equal(host(loaded[name]), host(saved[name])) for name in saved)


@pytest.mark.grids({"row": 2})
def test_further_files_stand_beside_the_arrays_and_are_verified(grid, shared_path):
    saved = arrays(grid)
    checkpoint.save(shared_path / "one", saved, {}, grid, files={"words.txt": b"one two"} if grid.rank == 0 else None)
    checkpoint.load(shared_path / "one", saved, grid)
    assert (shared_path / "one" / "words.txt").read_bytes() == b"one two"
    for name in ("../words.txt", "manifest.json", "index.h5"):
        with pytest.raises(CheckpointError, match="cannot stand beside the arrays: use a plain name"):
            checkpoint.save(shared_path / "two", saved, {}, grid, files={name: b""})
    comm.collect(None, grid)
    if grid.rank == 0:
        (shared_path / "one" / "words.txt").write_bytes(b"one too")
    comm.collect(None, grid)
    with pytest.raises(CheckpointError, match=r"words\.txt is not the file that was written"):
        checkpoint.load(shared_path / "one", saved, grid)


@pytest.mark.grids({"row": 2, "col": 2})
def test_some_arrays_load_from_more_if_that_is_wanted(grid, shared_path):
    saved, loaded = arrays(grid), arrays(grid, empty=True)
    some = {name: array for name, array in loaded.items() if name.startswith("weights/")}
    checkpoint.save(shared_path / "one", saved, {}, grid)
    with pytest.raises(CheckpointError, match="has \\['deep/er/c'\\] besides"):
        checkpoint.load(shared_path / "one", some, grid)
    checkpoint.load(shared_path / "one", some, grid, besides=True)
    assert all(np.array_equal(host(array), host(saved[name])) for name, array in some.items())


@pytest.mark.grids({"row": 2, "col": 3})
def test_another_layout_loads_it(grid, shared_path):
    saved = arrays(grid)
    checkpoint.save(shared_path / "one", saved, {}, grid)
    other = {name: zeros(a.shape, grid, Layout(("col", "row"), *[None] * (a.ndim - 1))) for name, a in saved.items()}
    checkpoint.load(shared_path / "one", other, grid)
    assert all(np.array_equal(other[name].gather(), saved[name].gather()) for name in saved)


@pytest.mark.grids({"row": 2})
def test_other_arrays_are_refused_by_name(grid, shared_path):
    checkpoint.save(shared_path / "one", arrays(grid), {}, grid)
    fewer, wrong = arrays(grid), arrays(grid)
    del fewer["weights/b"]
    wrong["weights/b"] = zeros((8,), grid, Layout(None))
    with pytest.raises(CheckpointError, match=r"has \['weights/b'\] besides"):
        checkpoint.load(shared_path / "one", fewer, grid)
    with pytest.raises(CheckpointError, match=r"weights/b is float64\(9,\) and the model's is float64\(8,\)"):
        checkpoint.load(shared_path / "one", wrong, grid)


@pytest.mark.grids({"row": 2})
def test_an_existing_directory_is_never_overwritten(grid, shared_path):
    saved = arrays(grid)
    checkpoint.save(shared_path / "one", saved, {}, grid)
    with pytest.raises(CheckpointError, match="a checkpoint is never overwritten"):
        checkpoint.save(shared_path / "one", {}, {}, grid)
    checkpoint.load(shared_path / "one", arrays(grid, empty=True), grid)


@pytest.mark.grids({"row": 2})
def test_a_failed_write_leaves_no_checkpoint_and_raises_on_all_ranks(grid, shared_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    if grid.rank == 1:
        monkeypatch.setattr(rank_file, "flush", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(shared_path / "one", arrays(grid), {}, grid)
    assert not (shared_path / "one").exists()
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(shared_path / "one", arrays(grid), grid)


@pytest.mark.grids({"row": 3})
@pytest.mark.parametrize(
    "names", [["a", "a/b"], ["a/"], [""], [".."], ["a\0b"]], ids=["prefix", "slash", "empty", "dots", "nul"]
)
def test_names_that_hdf5_cannot_hold_are_refused_on_all_ranks(grid, shared_path, names):
    array = zeros((2,), grid, Layout("row"))
    with pytest.raises(CheckpointError, match="HDF5"):
        checkpoint.save(shared_path / "one", dict.fromkeys(names, array), {}, grid)
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        checkpoint.save(shared_path / "one", {"a": array}, {"step": np.float32(1)}, grid)
    assert array.gather().size == 2  # the ranks are still in step
    assert not list(shared_path.iterdir())


@pytest.mark.grids({"row": 2})
def test_partial_sums_and_arrays_of_another_grid_are_refused(grid, shared_path):
    whole, partial = zeros((4,), grid, Layout("row")), zeros((4,), grid, Layout(None, partial="row"))
    other = zeros((4,), Grid(col=2), Layout("col"))
    checkpoint.save(shared_path / "one", {"a": whole}, {}, grid)
    with pytest.raises(CheckpointError, match="partial sums cannot be saved"):
        checkpoint.save(shared_path / "two", {"a": partial}, {}, grid)
    with pytest.raises(CheckpointError, match="lies on another grid"):
        checkpoint.save(shared_path / "two", {"a": other}, {}, grid)
    with pytest.raises(CheckpointError, match="load into an array without partial sums"):
        checkpoint.load(shared_path / "one", {"a": partial}, grid)


@pytest.mark.grids({"pipe": 2, "row": 2}, {"pipe": 2, "col": 3})
def test_parts_of_a_grid_save_arrays_of_their_own_and_any_grid_loads_them(grid, shared_path):
    place = grid.at(pipe=grid.coords["pipe"])
    mine = {f"stage{grid.coords['pipe']}/{name}": array for name, array in arrays(place).items()}
    checkpoint.save(shared_path / "one", mine, {"step": 1}, grid)
    exact = arrays(Grid(MPI.COMM_SELF))
    whole = {f"stage{i}/{name}": array for i in range(2) for name, array in arrays(grid, empty=True).items()}
    assert checkpoint.load(shared_path / "one", whole, grid) == {"step": 1}
    assert all(np.array_equal(array.gather(), host(exact[name.split("/", 1)[1]])) for name, array in whole.items())
    again = {name: zeros(array.shape, place, array.layout) for name, array in mine.items()}
    checkpoint.load(shared_path / "one", again, grid)
    assert all(np.array_equal(host(again[name]), host(mine[name])) for name in mine)
    with pytest.raises(CheckpointError, match="same is saved by two parts of the grid"):
        checkpoint.save(shared_path / "two", {"same": next(iter(mine.values()))}, {}, grid)
    lacking = {name: array for name, array in again.items() if grid.coords["pipe"] or not name.endswith("b")}
    with pytest.raises(CheckpointError, match=r"has \['stage0/weights/b'\] besides"):
        checkpoint.load(shared_path / "one", lacking, grid)


@pytest.mark.grids({"row": 2, "col": 3})
def test_another_grid_loads_it(grid, shared_path):
    saved = arrays(grid)
    checkpoint.save(shared_path / "one", saved, {}, grid)
    for other in (Grid(row=6), Grid(MPI.COMM_SELF)):
        loaded = arrays(other, empty=True)
        checkpoint.load(shared_path / "one", loaded, other)
        assert all(np.array_equal(loaded[name].gather(), saved[name].gather()) for name in saved)
