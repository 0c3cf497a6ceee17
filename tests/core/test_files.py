"""Nothing in a file is trusted: links, bytes of other files, absurd sizes and damage are errors of this package."""

import json
import os
import resource
import signal
from contextlib import contextmanager

import h5py
import numpy as np
import pytest

from colossal_mpi import CheckpointError, ColossalError, Grid, Layout, checkpoint, files, from_global, random, zeros
from colossal_mpi.checkpoint import checksums, manifest
from colossal_mpi.files import hdf5
from colossal_mpi.linalg import load, save
from tests.cases import host

FLAT = Layout(None, None)
SHAPE = (40, 30)


def values(grid, layout=FLAT, seed=1):
    return random.normal(SHAPE, grid, layout, seed, "x")


@contextmanager
def files_of_at_most(size):
    """Limit the size of files that this process can write, as a full file system does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, action)


def damaged(path, generator):
    """Flip a bit, overwrite or zero some bytes, exchange two stretches, or cut the file; return what was done."""
    data = bytearray(path.read_bytes())
    kind = ("flip", "random", "zero", "exchange", "cut")[generator.integers(5)]
    at, length = int(generator.integers(len(data))), int(generator.integers(1, 600))
    if kind == "flip":
        data[at] ^= 1 << int(generator.integers(8))
    elif kind == "random":
        data[at : at + length] = generator.bytes(len(data[at : at + length]))
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "exchange":
        to = int(generator.integers(len(data)))
        length = min(length, abs(at - to), len(data) - max(at, to))
        data[at : at + length], data[to : to + length] = data[to : to + length], data[at : at + length]
    else:
        del data[at:]
    path.write_bytes(data)
    return f"{kind} of {length} bytes at {at} of {path.name}"


COUNTS = [40, pytest.param(600, marks=pytest.mark.long)]


@pytest.mark.parametrize("count", COUNTS)
def test_damage_to_a_file_of_linalg_is_never_read_as_other_numbers(tmp_path, count):
    grid, path = Grid(row=1), tmp_path / "x.h5"
    expected, single = values(grid), from_global(np.float64(3.5), grid, Layout())
    save(path, "group/x", expected)
    save(path, "alone", single)
    intact, generator = path.read_bytes(), np.random.default_rng(7)
    found = []
    for _ in range(count):
        path.write_bytes(intact)
        what = damaged(path, generator)
        for name, array, layout in (("group/x", expected, FLAT), ("alone", single, Layout())):
            try:
                assert np.array_equal(host(load(path, name, grid, layout)), host(array)), what
            except ColossalError as problem:
                found.append(str(problem))
    assert len(found) > count // 3
    assert not any("\n" in message for message in found)


@pytest.mark.parametrize("count", COUNTS)
def test_damage_to_a_checkpoint_is_never_read_as_other_numbers(tmp_path, count):
    grid, directory = Grid(row=1), tmp_path / "one"
    expected = values(grid)
    checkpoint.save(directory, {"w/a": expected}, {"step": 3}, grid, files={"tokenizer.json": b"{}"})
    intact, generator = {path: path.read_bytes() for path in directory.iterdir()}, np.random.default_rng(8)
    found = []
    for number in range(count):
        for path, content in intact.items():
            path.write_bytes(content)
        what = damaged(sorted(intact)[number % len(intact)], generator)
        loaded = zeros(SHAPE, grid, FLAT)
        try:
            assert checkpoint.load(directory, {"w/a": loaded}, grid) == {"step": 3}, what
            assert np.array_equal(host(loaded), host(expected)), what
        except ColossalError as problem:
            found.append(str(problem))
    assert len(found) > count // 3
    assert not any("\n" in message for message in found)


def external_link(file):
    file["x"] = h5py.ExternalLink("secret.h5", "x")


def external_group(file):
    file["g"] = h5py.ExternalLink("secret.h5", "/")


def soft_link(file):
    file["y"] = np.ones(3)
    file["x"] = h5py.SoftLink("/y")


def external_storage(file):
    file.create_dataset("x", (64,), "u1", external=[("/etc/passwd", 0, 64)])


def virtual(file):
    layout = h5py.VirtualLayout((4, 6), "f8")
    layout[:] = h5py.VirtualSource("missing.h5", "x", (4, 6))
    file.create_virtual_dataset("x", layout)


def absurd(file):
    file.create_dataset("x", (2**31, 2**30), "f8", chunks=(1, 1024))


def bomb(file):
    file.create_dataset("x", (1 << 29,), "f8", chunks=(1 << 28,), compression="gzip")


@pytest.mark.parametrize(
    ("harm", "name", "message"),
    [
        (external_link, "x", "x is a link to another name or file"),
        (external_group, "g/x", "g is a link to another name or file"),
        (soft_link, "x", "x is a link to another name or file"),
        (external_storage, "x", "the elements of x lie in other files"),
        (virtual, "x", "the elements of x lie in other files"),
        (absurd, "x", "x claims 18,446,744,073,709,551,616 bytes, of which the file holds 0"),
        (bomb, "x", "x claims 4,294,967,296 bytes, of which the file holds 0"),
    ],
)
def test_no_name_in_an_hdf5_file_leads_to_other_files_or_to_more_than_it_holds(tmp_path, harm, name, message):
    grid = Grid(row=1)
    save(tmp_path / "secret.h5", "x", zeros((4, 6), grid, FLAT))
    with h5py.File(tmp_path / "evil.h5", "w") as file:
        harm(file)
    before = (tmp_path / "secret.h5").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "evil.h5", name, grid, FLAT)
    if harm in (external_group, external_link):
        with pytest.raises(CheckpointError, match="links are not followed"):
            save(tmp_path / "evil.h5", name.replace("g/x", "g/new"), zeros((4, 6), grid, FLAT), overwrite=True)
    assert (tmp_path / "secret.h5").read_bytes() == before


def test_a_file_of_linalg_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    grid = Grid(row=1)
    array = zeros((4, 6), grid, FLAT)
    save(tmp_path / "real.h5", "x", array)
    (tmp_path / "link.h5").symlink_to("real.h5")
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(CheckpointError, match=r"link.h5 cannot be written as HDF5: it is a link: name .*real.h5"):
        save(tmp_path / "link.h5", "y", array)
    with pytest.raises(CheckpointError, match="it is a pipe and must be a regular file"):
        load(tmp_path / "pipe.h5", "x", grid, FLAT)
    with pytest.raises(CheckpointError, match="cannot be written as HDF5"):
        save(tmp_path / "pipe.h5", "x", array)


def test_a_dataset_without_checksums_loads_with_a_word(tmp_path, capfd):
    grid, path = Grid(row=1), tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.ones((4, 6))
    assert host(load(path, "x", grid, FLAT)).sum() == 24
    assert "x has no checksums: damage would not be found" in capfd.readouterr().err
    save(path, "x", values(grid), overwrite=True)
    load(path, "x", grid, FLAT)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("size", [0, 1000, 3000, 9000])
@pytest.mark.parametrize("reserved", [True, False], ids=["full", "failing"])
def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch, size, reserved):
    grid = Grid(row=1)
    save(tmp_path / "old.h5", "kept", zeros((2, 2), grid, FLAT))
    before = (tmp_path / "old.h5").read_bytes()
    if not reserved:
        monkeypatch.setattr(hdf5, "_reserve", lambda *_: None)
    for name in ("new.h5", "old.h5") if reserved else ("new.h5",):
        with files_of_at_most(size), pytest.raises(CheckpointError, match=f"{name} cannot be written.*File too large"):
            save(tmp_path / name, "x", values(grid))
    assert os.listdir(tmp_path) == ["old.h5"]
    with h5py.File(tmp_path / "old.h5") as file:
        assert list(file) == ["kept"]
    assert (tmp_path / "old.h5").read_bytes()[48:] == before[48:]


def odd_bytes(table):
    table["files"]["rank00000.h5"]["bytes"] = "x"


def odd_parts(table):
    table["files"]["rank00000.h5"]["parts"] = "abc"


def no_parts(table):
    table["files"]["rank00000.h5"]["parts"] = []


def negative_part(table):
    table["files"]["rank00000.h5"]["parts"] = [[0, -5, "crc32:00000000", ""]]


def odd_checksum(table):
    table["files"]["rank00000.h5"]["parts"][0][2] = "md5:0"


def odd_array(table):
    table["arrays"]["w"] = 7


def odd_shape(table):
    table["arrays"]["w"]["shape"] = [-1, 4]


def absurd_shape(table):
    table["arrays"]["w"]["shape"] = [2**62, 2**62]


def odd_dtype(table):
    table["arrays"]["w"]["dtype"] = "object"


def no_layout(table):
    del table["arrays"]["w"]["layout"]


def odd_value(table):
    table["values"]["x"] = 3


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (odd_bytes, "files.rank00000.h5.bytes: input should be a valid integer"),
        (odd_parts, "files.rank00000.h5.parts: input should be a valid "),
        (no_parts, "its checksums do not cover rank00000.h5"),
        (negative_part, "greater than or equal to 0"),
        (odd_checksum, "string should match pattern"),
        (odd_array, "arrays.w: input should be an object"),
        (odd_shape, "arrays.w.shape.0: input should be greater than or equal to 0"),
        (absurd_shape, "w claims [0-9,]+ bytes, and all files hold"),
        (odd_dtype, "arrays.w.dtype: string should match"),
        (no_layout, "arrays.w.layout: field required"),
        (odd_value, "values.x: input should be an object"),
    ],
)
def test_a_manifest_that_was_made_to_harm_is_refused(tmp_path, harm, message):
    grid = Grid(row=1)
    checkpoint.save(tmp_path / "one", {"w": values(grid)}, {}, grid)
    table = json.loads((tmp_path / "one" / "manifest.json").read_text())
    harm(table)
    manifest.write_manifest(tmp_path / "one", table)
    with pytest.raises(CheckpointError, match=f"manifest.json is damaged: .*{message}"):
        checkpoint.read_manifest(tmp_path / "one")


def reseal(directory):
    table = json.loads((directory / "manifest.json").read_text())
    table["files"] = {name: checksums.single_part(directory / name) for name in table["files"]}
    manifest.write_manifest(directory, table)


def hidden_group(directory):
    with h5py.File(directory / "rank00000.h5", "a") as file:
        del file["g"]
        file["g"] = h5py.ExternalLink("../secret.h5", "/")


def hidden_index(directory):
    with h5py.File(directory / "index.h5", "a") as file:
        del file["g"]
        file["g"] = h5py.ExternalLink("../secret.h5", "/")


def index_of_another_name(directory):
    with h5py.File(directory / "index.h5", "a") as file:
        del file["g/w"]
        layout = h5py.VirtualLayout(SHAPE, "f8")
        layout[:] = h5py.VirtualSource("rank00000.h5", "v", SHAPE)
        file.create_virtual_dataset("g/w", layout)


def index_with_a_hole(directory):
    with h5py.File(directory / "index.h5", "a") as file:
        del file["g/w"]
        layout = h5py.VirtualLayout(SHAPE, "f8")
        layout[:2] = h5py.VirtualSource("rank00000.h5", "g/w", (2, SHAPE[1]))
        file.create_virtual_dataset("g/w", layout)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (hidden_group, "g/w is no dataset of this file"),
        (hidden_index, "index.h5 has no g/w"),
        (index_of_another_name, "g/w points to v"),
        (index_with_a_hole, "the blocks of g/w have 60 of its 1200 elements"),
    ],
)
def test_a_checkpoint_reads_only_its_own_files(tmp_path, harm, message):
    grid, directory = Grid(row=1), tmp_path / "one"
    save(tmp_path / "secret.h5", "w", values(grid, seed=3))
    checkpoint.save(directory, {"g/w": values(grid), "v": values(grid, seed=2)}, {}, grid)
    harm(directory)
    reseal(directory)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(directory, {name: zeros(SHAPE, grid, FLAT) for name in ("g/w", "v")}, grid)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def outside(path):
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.write_bytes(b"{}")
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["manifest.json", "rank00000.h5", "index.h5"])
@pytest.mark.parametrize("harm", [pipe, device, outside])
def test_a_checkpoint_takes_regular_files_of_its_directory_only(tmp_path, name, harm):
    grid, directory = Grid(row=1), tmp_path / "one"
    checkpoint.save(directory, {"w": values(grid)}, {}, grid)
    (directory / name).unlink()
    harm(directory / name)
    with pytest.raises(CheckpointError, match="it is a pipe|it is a device|it is a link out of"):
        checkpoint.load(directory, {"w": zeros(SHAPE, grid, FLAT)}, grid)


def test_a_link_in_place_of_the_partial_directory_is_not_followed(tmp_path):
    grid = Grid(row=1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "kept").touch()
    (tmp_path / ".one.partial").symlink_to("precious")
    checkpoint.save(tmp_path / "one", {"w": values(grid)}, {}, grid)
    assert os.listdir(tmp_path / "precious") == ["kept"]


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 65 + b"]" * 65])
def test_depth_is_limited(text):
    with pytest.raises(ValueError, match="nested deeper than 64"):
        files.parse_json(text)
    with pytest.raises(ValueError, match="nested deeper than 64"):
        files.parse_toml("x = " + "[" * 100_000)
    assert files.parse_json(b"\xef\xbb\xbf" + b'{"a": ["\\"[[", "}"]}') == {"a": ['"[[', "}"]}


def test_a_written_file_replaces_a_link_and_stays_as_it_was_on_a_full_disk(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out").symlink_to("victim")
    with pytest.raises(OSError, match="it is a link"):
        files.append(tmp_path / "out", "x")
    files.write_new(tmp_path / "out", "text")
    assert (tmp_path / "victim").read_text() == "precious"
    with files_of_at_most(6), pytest.raises(OSError, match="File too large"):
        files.write_new(tmp_path / "out", "long text")
    with files_of_at_most(6), pytest.raises(OSError, match="File too large"):
        files.append(tmp_path / "out", "long text")
    assert (tmp_path / "out").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == ["out", "victim"]
    with pytest.raises(OSError, match="it has 4 bytes and may have 3"):
        files.read_bytes(tmp_path / "out", 3)
