"""On the disk a checkpoint is plain HDF5 with each byte once, checksums of parts, and a numbered format."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from colossal_mpi import CheckpointError, Layout, checkpoint, comm, random, zeros
from colossal_mpi.checkpoint import checksums, manifest
from tests.cases import host

VALUES = {"run/step": (3, "steps"), "run/rate": (0.5, "per step"), "run/name": ("cosine", "1"), "run/at": ([1, 2], "1")}


def arrays(grid, empty=False):
    made = {}
    for name, shape, dims in (("w/a", (7, 5), ("row", None)), ("w/b", (9,), (None,)), ("c", (1, 3), ("row", None))):
        layout = Layout(*dims)
        made[name] = zeros(shape, grid, layout) if empty else random.normal(shape, grid, layout, 1, name)
    return made


def agree(grid):
    comm.collect(None, grid)


FOREIGN = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("colossal_mpi", "mpi4py"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import h5py, numpy
with h5py.File(sys.argv[1]) as index:
    numpy.save(sys.argv[2], index["w/a"][...])
    attributes = dict(index["w/a"].attrs)
    assert attributes["shape"].tolist() == [7, 5], attributes
    told = {name: attributes[name] for name in ("dtype", "layout", "grid", "units")}
    assert told == {"dtype": "float64", "layout": "Layout('row', None)", "grid": "row=2", "units": "1"}, told
    run = index["run"]
    assert (run["step"][()], run["rate"][()], run["name"].asstr()[()]) == (3, 0.5, "cosine")
    assert run["at"][...].tolist() == [1, 2] and run["step"].attrs["units"] == "steps"
"""


@pytest.mark.grids({"row": 2})
def test_plain_h5py_without_this_package_reads_whole_arrays_and_each_element_is_stored_once(grid, shared_path):
    import h5py

    saved, directory = arrays(grid), shared_path / "one"
    checkpoint.save(directory, saved, {}, grid, values=VALUES)
    if grid.rank == 0:
        out = shared_path / "a.npy"
        command = [sys.executable, "-c", FOREIGN, directory / "index.h5", out]
        result = subprocess.run(command, cwd="/", env={}, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
    agree(grid)
    assert np.array_equal(np.load(shared_path / "a.npy"), saved["w/a"].gather())
    stored = 0
    for path in directory.glob("rank*.h5"):
        with h5py.File(path) as file:
            stored += sum(file[name].size for name in saved if name in file)
    assert stored == sum(array.size for array in saved.values())
    assert checkpoint.read_manifest(directory)["values"]["run/rate"] == {"value": 0.5, "units": "per step"}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def part_of(directory, name):
    return next(part for part in checksums.parts_of(manifest.read_manifest(directory)["files"]) if part.dataset == name)


def flip_data(directory, other):
    flip(directory / "rank00000.h5", part_of(directory, "w/b").offset + 11)


def flip_structure(directory, other):
    flip(directory / "rank00000.h5", 20)


def truncate(directory, other):
    where = part_of(directory, "w/b")
    os.truncate(directory / where.file, where.offset + 1)


def lengthen(directory, other):
    with (directory / "index.h5").open("ab") as file:
        file.write(b"x")


def remove(directory, other):
    (directory / "rank00000.h5").unlink()


def foreign(directory, other):
    (directory / "rank00000.h5").write_bytes((other / "rank00000.h5").read_bytes())


def cut_manifest(directory, other):
    (directory / "manifest.json").write_text("{")


def flip_manifest(directory, other):
    text = (directory / "manifest.json").read_text()
    (directory / "manifest.json").write_text(text.replace('"step": 3', '"step": 2'))


def newer(directory, other):
    table = json.loads((directory / "manifest.json").read_text())
    manifest.write_manifest(directory, table | {"format_version": 99})


def leave_out(directory, other):
    table = manifest.read_manifest(directory)
    del table["files"]["rank00000.h5"]
    manifest.write_manifest(directory, table)


def climb(directory, other):
    table = manifest.read_manifest(directory)
    table["files"]["../x.h5"] = table["files"]["rank00000.h5"]
    manifest.write_manifest(directory, table)


def hide(directory, other):
    """Replace a dataset by a link to another file, and correct all checksums."""
    import h5py

    with h5py.File(directory / "rank00000.h5", "a") as file:
        del file["w/b"]
        file["w/b"] = h5py.ExternalLink(str(other / "rank00000.h5"), "w/b")
    table = manifest.read_manifest(directory)
    table["files"]["rank00000.h5"] = checksums.single_part(directory / "rank00000.h5")
    manifest.write_manifest(directory, table)


DAMAGES = [
    (flip_data, r"rank00000.h5 is not the file that was written, in w/b \(the checksum of bytes \d+ to \d+ differs\)"),
    (flip_structure, "rank00000.h5 is not the file that was written, in what describes its datasets"),
    (truncate, r"rank00000.h5 has \d+ of its \d+ bytes, with w/b"),
    (lengthen, r"index.h5 has \d+ bytes and was written with \d+"),
    (remove, "rank00000.h5 is missing, with w/a, w/b"),
    (foreign, r"rank00000.h5 is not the file that was written, in w/\w \(.*; .*in w/\w \("),
    (cut_manifest, "manifest.json is damaged: it is no JSON"),
    (flip_manifest, "manifest.json is damaged: it is not the file that was written"),
    (newer, "format_version 99; this version of colossal_mpi reads 1 to 2: use the newer one that wrote it"),
    (leave_out, r"index.h5 needs \['rank00000.h5'\]"),
    (climb, r"'../x.h5' is no file of this directory"),
    (hide, "w/b is no dataset of this file"),
]


@pytest.mark.grids({"row": 2}, {"row": 3})
@pytest.mark.parametrize(("harm", "message"), DAMAGES, ids=[harm.__name__ for harm, _ in DAMAGES])
def test_damage_is_found_on_all_ranks_before_anything_is_loaded(grid, shared_path, harm, message):
    directory, loaded = shared_path / "one", arrays(grid, empty=True)
    checkpoint.save(directory, arrays(grid), {"step": 3}, grid)
    other = {name: array * 2.0 for name, array in arrays(grid).items()}
    checkpoint.save(shared_path / "two", other, {"step": 3}, grid)
    if grid.rank == 0:
        harm(directory, shared_path / "two")
    agree(grid)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(directory, loaded, grid)
    if harm is not hide:  # only reading finds this one, which no accident causes
        assert all(not host(array).any() for array in loaded.values())


@pytest.mark.grids({"row": 2})
def test_damage_of_arrays_that_are_not_wanted_does_not_matter(grid, shared_path):
    saved, loaded = arrays(grid), {"w/a": arrays(grid, empty=True)["w/a"]}
    checkpoint.save(shared_path / "one", saved, {}, grid)
    if grid.rank == 0:
        flip_data(shared_path / "one", None)
    agree(grid)
    checkpoint.load(shared_path / "one", loaded, grid, besides=True)
    assert np.array_equal(host(loaded["w/a"]), host(saved["w/a"]))


def to_version_1(directory):
    """Rewrite a manifest in the first format, which has a SHA-256 of each file but not of itself."""
    table = manifest.read_manifest(directory)
    names = table["files"]
    table["files"] = {
        name: {
            "bytes": (directory / name).stat().st_size,
            "sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    arrays = {name: {key: a[key] for key in ("shape", "dtype", "layout")} for name, a in table["arrays"].items()}
    old = {"format_version": 1, "metadata": table["metadata"], "arrays": arrays, "files": table["files"]}
    (directory / "manifest.json").write_text(json.dumps(old))


@pytest.mark.grids({"row": 2})
def test_the_first_format_is_read_and_its_damage_found(grid, shared_path):
    directory, saved, loaded = shared_path / "one", arrays(grid), arrays(grid, empty=True)
    checkpoint.save(directory, saved, {"step": 3}, grid)
    if grid.rank == 0:
        to_version_1(directory)
    agree(grid)
    assert checkpoint.load(directory, loaded, grid) == {"step": 3}
    assert all(np.array_equal(host(loaded[name]), host(saved[name])) for name in saved)
    agree(grid)
    if grid.rank == 0:
        flip(directory / "rank00000.h5", (directory / "rank00000.h5").stat().st_size - 1)
    agree(grid)
    with pytest.raises(CheckpointError, match="rank00000.h5 is not the file that was written"):
        checkpoint.load(directory, loaded, grid)


@pytest.mark.grids({"row": 2})
@pytest.mark.parametrize("name", ["w/a", "w/a/b", "w", "..", ""])
def test_values_need_names_of_their_own(grid, shared_path, name):
    with pytest.raises(CheckpointError, match="HDF5|names an array and a value"):
        checkpoint.save(shared_path / "one", arrays(grid), {}, grid, values={name: (1, "1")})
    assert not list(shared_path.iterdir())


@pytest.mark.grids({"row": 2})
def test_bits_of_bfloat16_come_back(grid, shared_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    saved = random.normal((5, 3), grid, Layout("row", None), 1, "x").astype(ml_dtypes.bfloat16)
    loaded = zeros((5, 3), grid, Layout("row", None), ml_dtypes.bfloat16)
    checkpoint.save(shared_path / "one", {"x": saved}, {}, grid)
    checkpoint.load(shared_path / "one", {"x": loaded}, grid)
    assert np.array_equal(host(loaded).view(np.uint16), host(saved).view(np.uint16))


def characters_read():
    """Return the bytes that this process has read by system calls so far."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count")
@pytest.mark.grids({"row": 2}, {"row": 3, "col": 2})
def test_all_ranks_together_read_each_byte_once_to_verify_and_once_to_load(grid, shared_path):
    axes = tuple(grid.axes)
    state = {f"w{i}": random.normal((2048, 512), grid, Layout(axes, None), 1, f"w{i}") for i in range(2)}
    size = sum(8 * array.size for array in state.values())
    checkpoint.save(shared_path / "one", state, {}, grid)
    for layout in (Layout(axes, None), Layout(None, axes[::-1]), Layout(None, axes[-1]), Layout(axes[-1], None)):
        loaded = {name: zeros(array.shape, grid, layout) for name, array in state.items()}
        before = characters_read()
        checkpoint.load(shared_path / "one", loaded, grid)
        total = sum(comm.collect(characters_read() - before, grid))
        assert 2 * size < total < 2.02 * size, layout
        assert all(np.array_equal(host(loaded[name]), whole(state[name], loaded[name])) for name in state)


def whole(array, like):
    return host(array.redistribute(like.layout))


@pytest.mark.grids({"row": 2})
def test_saving_and_loading_take_less_than_a_tenth_of_the_state(grid, shared_path):
    if grid.device != "cpu":
        pytest.skip("blocks of a device pass through host memory, one array at a time")
    state = {f"w{i}": random.normal((3000, 1000), grid, Layout("row", None), 1, f"w{i}") for i in range(3)}
    checkpoint.save(shared_path / "warm", arrays(grid), {}, grid)
    tracemalloc.start()
    checkpoint.save(shared_path / "one", state, {}, grid)
    checkpoint.load(shared_path / "one", state, grid)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * sum(array.local.nbytes for array in state.values())
