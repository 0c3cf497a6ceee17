"""``colossal-mpi inspect`` shows the contents of a checkpoint, its damage, and the difference of two checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import CheckpointError, Grid, Layout, checkpoint, comm, from_global, random
from colossal_mpi.apps.cli.inspect import inspect
from colossal_mpi.checkpoint import checksums, inspection
from colossal_mpi.runtime.launcher import mpiexec_command
from tests import command_line

META = {"step": 7, "config": {"training": {"lr": 0.5}}, "model": {"kind": "gpt", "sizes": None}}
VALUES = {"training/step": (7, "steps")}


def arrays(grid):
    shapes = {"weights/layer10/w": (300, 7), "weights/layer9/w": (5,), "weights/b": (), "empty": (0, 3)}
    return {
        name: random.normal(shape, grid, Layout(*[tuple(grid.axes), None][: len(shape)]), 1, name)
        for name, shape in shapes.items()
    }


def write(path, grid, change=lambda name, array: array, values=None, skip=()):
    made = {name: change(name, array) for name, array in arrays(grid).items() if name not in skip}
    checkpoint.save(path, made, META, grid, values=values or VALUES)


def call(ranks, *arguments):
    if ranks == 1:
        return command_line.call("inspect", *arguments)
    words = [sys.executable, "-m", "colossal_mpi.apps.cli", "inspect", *map(str, arguments)]
    command, env = mpiexec_command(ranks, words)
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False)


def test_a_reader_sees_everything(tmp_path):
    write(tmp_path / "run" / "checkpoints" / "step-7", Grid(MPI.COMM_SELF))
    (tmp_path / "run" / "config.toml").touch()
    checkpoint.point_latest(tmp_path / "run" / "checkpoints" / "step-7")
    shown = call(1, tmp_path / "run")
    assert shown.returncode == 0, shown.stderr
    lines = [" ".join(line.replace("│", " ").split()) for line in shown.stdout.splitlines()]
    text = "\n".join(lines)
    assert "step-7: step 7, 4 arrays, 16.5 KiB, in 2 files, format 2" in text
    assert "training" in lines[1]
    assert "step 7 steps" in lines[2]
    assert "300 x 7 float64 16.4 KiB Layout(None, None)" in text
    assert text.index("layer9") < text.index("layer10")
    assert "scalar float64 8 B Layout()" in text
    assert 'kind = "gpt"' in text
    assert "[training]\nlr = 0.5" in text
    assert "2 files of the sizes written; --verify checks every byte" in text


@pytest.mark.parametrize("ranks", [1, 3])
def test_verifying_finds_every_damage_and_says_so_once(tmp_path, ranks):
    write(tmp_path / "one", Grid(MPI.COMM_SELF))
    good = call(ranks, tmp_path / "one", "--verify")
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("verified: all") == 1
    table = checksums.parts_of(checkpoint.read_manifest(tmp_path / "one")["files"])
    path = tmp_path / "one" / "rank00000.h5"
    data = bytearray(path.read_bytes())
    for name in ("weights/layer10/w", "weights/b"):
        data[next(part.offset for part in table if part.dataset == name) + 3] ^= 1
    path.write_bytes(data)
    assert call(1, tmp_path / "one").returncode == 0
    bad = call(ranks, tmp_path / "one", "--verify")
    assert bad.returncode == 1
    assert bad.stdout.count("rank00000.h5 is not the file that was written, in weights/layer10/w") == 1
    assert bad.stdout.count("rank00000.h5 is not the file that was written, in weights/b") == 1
    assert "Traceback" not in bad.stderr
    path.unlink()
    lost = call(ranks, tmp_path / "one")
    assert lost.returncode == 1
    assert lost.stdout.count("rank00000.h5 is missing, with weights/layer10/w") == 1


def test_what_is_no_checkpoint_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        result = call(1, path)
        assert result.returncode == 1
        assert result.stderr.startswith(f"colossal_mpi: error: no checkpoint at {path}: manifest.json is missing")


def changed(name, array):
    """Change one element of an array by 1/4, put a NaN into another one and turn a third to float32."""
    if name == "weights/layer9/w":
        return array.astype("float32")
    value = {"weights/layer10/w": 0.25, "weights/b": np.nan}.get(name, 0)
    whole = comm.collect(None, array.grid) and array.gather()
    whole = comm.share(whole, array.grid)
    if value:
        whole[(-1,) * whole.ndim] += value
    return from_global(whole, array.grid, array.layout)


@pytest.mark.ranks(3)
def test_two_checkpoints_of_other_grids_differ_in_what_was_changed(shared_path, capsys):
    grid, alone = Grid(row=3), Grid(MPI.COMM_SELF, row=1)
    write(shared_path / "one", grid)
    write(shared_path / "two", Grid(col=3))
    write(shared_path / "three", grid, changed, {"training/step": (8, "steps"), "more": (1, "1")}, skip=["empty"])
    for some in (grid, alone):
        assert checkpoint.differences(shared_path / "one", shared_path / "two", some) == []
        found = {d.name: d for d in checkpoint.differences(shared_path / "one", shared_path / "three", some)}
        assert {name: d.what for name, d in found.items()} == {
            "empty": "only in the first",
            "more": "only in the second",
            "training/step": "7, 8",
            "weights/layer10/w": "other elements",
            "weights/layer9/w": "float64(5,), float32(5,)",
            "weights/b": "other elements",
        }
        largest = np.abs(arrays(alone)["weights/layer10/w"].local).max()
        wide = found["weights/layer10/w"]
        assert (wide.elements, wide.absolute) == (1, pytest.approx(0.25, rel=1e-14))
        assert wide.relative == pytest.approx(0.25 / largest, rel=1e-14)
        assert (found["weights/b"].elements, found["weights/b"].absolute) == (1, np.inf)
    assert inspect(shared_path / "one", False, shared_path / "two") == 0
    assert inspect(shared_path / "one", True, shared_path / "three") == 1
    shown = capsys.readouterr().out
    assert ("only in the second" in shown) == (grid.rank == 0)
    if grid.rank == 0:
        (Path(shared_path) / "two" / "rank00001.h5").unlink()
    comm.collect(None, grid)
    with pytest.raises(CheckpointError, match=r"rank00001.h5 is missing"):
        checkpoint.differences(shared_path / "one", shared_path / "two", grid)


def test_boxes_tile_an_array_and_bfloat16_is_read_as_float32(tmp_path, monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    grid = Grid(MPI.COMM_SELF)
    state = arrays(grid)
    state["half"] = state["weights/layer10/w"].astype(ml_dtypes.bfloat16)
    checkpoint.save(tmp_path / "one", state, {}, grid)
    monkeypatch.setattr(inspection, "_BOX_BYTES", 500)
    with inspection.CheckpointReader(tmp_path / "one") as reader:
        boxes = list(reader.boxes("weights/layer10/w"))
        assert len(boxes) > 30
        read = np.concatenate([reader.read("weights/layer10/w", box) for box in boxes])
        half = np.concatenate([reader.read("half", box) for box in reader.boxes("half")])
        assert list(reader.boxes("empty")) == []
        assert reader.read("weights/b", ()) == state["weights/b"].local
    assert np.array_equal(read, state["weights/layer10/w"].local)
    assert np.array_equal(half, state["half"].local.astype(np.float32))
