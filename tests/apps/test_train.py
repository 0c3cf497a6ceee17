"""``colossal-mpi train`` writes its files, resumes, and gives one clear message when it cannot run."""

import json
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import ConfigError
from colossal_mpi.apps.config import load
from colossal_mpi.apps.training import compare
from colossal_mpi.apps.training.train import make_grid
from colossal_mpi.runtime.launcher import mpiexec_command
from tests.command_line import RUN

SMALL = (
    """
[model]
layers = 2
hidden = 20
heads = 5
context = 12
[training]
steps = 6
batch = 5
microbatches = 2
warmup = 2
evaluate_every = 3
evaluate_batches = 2
checkpoint_every = 3
sample = 5
[parallel]
grid = { row = 2, col = 2 }
tensor = "2d"
kernels = "reference"
"""
    + RUN
)
CLI = [sys.executable, "-m", "colossal_mpi.apps.cli", "train"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(ranks, *arguments):
    command, env = mpiexec_command(ranks, [*CLI, *arguments])
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)


def final_state(run):
    with h5py.File(run / "checkpoints" / "step-0000006" / "index.h5") as file:
        names = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        return {name: file[name][...] for name in names}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_resumes_bitwise(folder):
    whole = start(4, "small.toml", "--set", "run.report=true", "--set", "run.forecast=true")
    assert whole.returncode == 0, whole.stderr
    run = folder / "run"
    assert "predicted and measured, rank 0: words of a step " in whole.stdout
    exact, losses = final_state(run), [row["loss"] for row in rows(run)]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert rows(run)[2]["val_loss"] > 0
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "row=2, col=2" in (run / "report" / "index.html").read_text()
    assert {event["pid"] for event in json.loads((run / "trace.json").read_text())["traceEvents"]} == {0, 1, 2, 3}
    assert [len(row["ranks"]["memory"]) for row in rows(run) if "ranks" in row] == [4, 4]
    assert len((run / "sample.txt").read_bytes()) == len(b"\nThe ") + 5
    assert (run / "checkpoints" / "latest").resolve().name == "step-0000006"
    assert "tokens/s" in whole.stdout
    assert re.search(r"left|\d:\d\d:\d\d", whole.stdout)  # Open MPI gives rank 0 a terminal, where it shows a bar
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step-0000003")
    again = start(4, "--resume", "run", "--set", "run.forecast=false")
    assert again.returncode == 0, again.stderr
    resumed = final_state(run)
    assert set(resumed) == set(exact)
    assert all(np.array_equal(resumed[name], exact[name]) for name in exact)
    assert [row["loss"] for row in rows(run)] == losses


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ("row=2,col=2", []),
        ("data=2,row=2", ["training.optimizer=muon", "parallel.zero=2"]),
        ("pipe=2,row=2", ["parallel.schedule=zero-bubble", "training.rate=wsd"]),
        ("pipe=2,data=2", ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.zero=1"]),
    ],
)
def test_a_run_resumes_on_another_grid(folder, grid, settings):
    settings = ["parallel.dtype=float64", *settings]
    settings = [word for setting in settings for word in ("--set", setting)]
    first = start(4, "small.toml", *settings, "--grid", grid)
    assert first.returncode == 0, first.stderr
    run = folder / "run"
    losses = [row["loss"] for row in rows(run)]
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to("step-0000003")
    plain = ["parallel.schedule=1f1b", "parallel.virtual_stages=1", "parallel.zero=3"]
    plain = [word for setting in plain for word in ("--set", setting)]
    other = start(3, "--resume", "run", "--grid", "data=3", "--tensor", "none", *plain)
    assert other.returncode == 0, other.stderr
    assert np.allclose([row["loss"] for row in rows(run)], losses, rtol=1e-9, atol=0)


def test_half_precision_trains_and_resumes_at_any_dtype(folder):
    """Blocks are recomputed, too. A float16 run resumes bitwise in float16, and also resumes in float32."""
    losses = {}
    for dtype in ("float32", "float16"):
        words = ["parallel.recompute=full", f"parallel.dtype={dtype}", f"run.directory={dtype}"]
        done = start(2, "small.toml", "--grid", "row=1,col=2", *[word for x in words for word in ("--set", x)])
        assert done.returncode == 0, done.stderr
        losses[dtype] = [row["loss"] for row in rows(folder / dtype)]
    assert np.allclose(losses["float16"], losses["float32"], rtol=2.0**-9, atol=0)
    run = folder / "float16"
    assert {row["loss_scale"] for row in rows(run)} == {2.0**16}
    exact = final_state(run)
    arrays = [array for name, array in exact.items() if name.startswith(("weights/", "optimizer/"))]
    assert {array.dtype.name for array in arrays} == {"float32"}
    for dtype, same in (("float16", True), ("float32", False)):
        (run / "checkpoints" / "latest").unlink()
        (run / "checkpoints" / "latest").symlink_to("step-0000003")
        again = start(2, "--resume", "float16", "--set", f"parallel.dtype={dtype}")
        assert again.returncode == 0, again.stderr
        resumed = final_state(run)
        assert all(np.array_equal(resumed[name], exact[name]) for name in exact if name in resumed) == same
        assert np.allclose([row["loss"] for row in rows(run)], losses["float32"], rtol=2.0**-9, atol=0)


@pytest.mark.parametrize(
    ("ranks", "arguments", "message"),
    [
        (4, ["small.toml", "--set", "training.stepps=1"], "unknown key training.stepps=1; known here are steps"),
        (3, ["small.toml"], "needs 4 ranks and there are 3: start 4 (mpiexec -n 4 ...)"),
        (
            4,
            ["small.toml", "--set", 'data.files=["/nowhere/text"]'],
            "data.files: cannot read /nowhere/text: No such file",
        ),
        (4, ["--resume", "nowhere"], "no run to resume at nowhere"),
        (4, ["missing.toml"], "cannot read config missing.toml"),
        (4, ["small.toml", "--tensor", "1d"], "tensor='1d' uses the axes data, seq, ulysses, col and not row"),
        (4, ["small.toml", "--set", "model.heads=3"], "3 heads do not divide hidden=20: use heads in {1, 2, 4, 5, 10}"),
        (4, ["small.toml", "--frobnicate"], "No such option: --frobnicate"),
        (4, ["small.toml", "--set", "run.directory=/proc/nowhere"], "run.directory='/proc/nowhere' cannot be written"),
    ],
    ids=["key", "ranks", "corpus", "resume", "config", "mode", "heads", "option", "directory"],
)
def test_what_cannot_run_says_so_once(folder, ranks, arguments, message):
    begun = time.monotonic()
    result = start(ranks, *arguments)
    seconds = time.monotonic() - begun
    assert result.returncode != 0
    assert result.stderr.count("colossal_mpi: error:") == 1, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert seconds < 5 + startup(), result.stderr


@cache
def startup():
    """Return the seconds that starting four ranks of the program takes on this machine."""
    begun = time.monotonic()
    start(4, "--help")
    return time.monotonic() - begun


def test_a_run_is_not_overwritten_unless_asked(folder):
    settings = ["training.steps=1", "training.sample=0", "run.report=true"]
    quick = ["small.toml", "--grid", "data=1", "--tensor", "none", *(w for s in settings for w in ("--set", s))]
    assert start(1, *quick).returncode == 0
    run = folder / "run"
    (run / "notes.txt").write_text("the user's own")
    (run / "report" / "mine.png").write_text("the user's own")
    refused = start(1, *quick)
    assert refused.returncode != 0
    assert "go on with --resume run, replace it with --overwrite" in refused.stderr
    (run / "report" / "words.png").write_bytes(b"of another grid")
    again = start(1, *quick, "--overwrite", "--kernels", "torch")
    assert again.returncode == 0, again.stderr
    assert ", torch kernels; " in again.stdout
    assert 'kernels = "torch"' in (folder / "run" / "config.toml").read_text()
    assert (run / "notes.txt").exists()
    assert (run / "report" / "mine.png").exists()
    assert not (run / "report" / "words.png").exists()


def test_a_config_that_is_no_runs_is_never_overwritten(folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text("mine")
    refused = start(1, "small.toml", "--grid", "data=1", "--tensor", "none", "--overwrite")
    assert "run/config.toml belongs to no run" in refused.stderr
    assert (folder / "run" / "config.toml").read_text() == "mine"


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(folder):
    result = start(2, "small.toml", "--grid", "data=2", "--tensor", "none", "--set", "training.lr=1e38")
    assert result.returncode != 0
    assert result.stderr.count("colossal_mpi: error: step 2: loss nan") == 1, result.stderr
    assert all(np.isfinite(row["loss"]) for row in rows(folder / "run"))


def test_resuming_survives_a_cut_line_and_a_lost_link_and_keeps_its_settings(folder):
    one = ["small.toml", "--grid", "data=1", "--tensor", "none", "--set", "training.sample=0"]
    assert start(1, *one, "--set", "training.steps=3").returncode == 0
    run = folder / "run"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "step-0000003.bak").mkdir()
    fewer = start(1, "--resume", "run", "--set", "training.steps=2")
    assert "has done 3 steps, and training.steps=2: give more" in fewer.stderr
    more = start(1, "--resume", "run", "--set", "training.steps=5")
    assert more.returncode == 0, more.stderr
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]
    assert "steps = 5" in (run / "config.toml").read_text()


def test_every_mode_does_the_steps_of_one_rank(folder, monkeypatch):
    ragged = [
        compare.Case("one rank", "none", "ring", {"data": 1}),
        compare.Case("2d", "2d", "ring", {"row": 2, "col": 2}),
        compare.Case("3d", "3d", "ring", {"col": 2, "depth": 2}),
        compare.Case("ring", "none", "ring", {"seq": 3}),
        compare.Case("ulysses", "none", "ring", {"ulysses": 2}),
    ]
    monkeypatch.setattr(compare, "cases", lambda: ragged)
    result = compare.modes(str(folder / "small.toml"), folder / "compare", steps=3)
    reference = result["one rank"]["losses"]
    assert len(reference) == 3
    for name in ("2d", "3d", "ring", "ulysses"):
        assert np.allclose(result[name]["losses"], reference, rtol=1e-12, atol=0)
        assert 0 < result[name]["max_gradient_difference"] < 1e-10
        assert result[name]["words_per_step"] > 0
    c, weights, stream = 3, 15520, 5 * 12 * 20
    reduced = 2 * (c - 1) * (weights + 3)  # gradients, the loss of each microbatch, their norm
    # in zig-zag order three quarters of all keys of others are seen; they come twice, and their cotangents go home once
    assert result["ring"]["words_per_step"] == reduced + 2 * 3 * 3 * (c - 1) * stream // 2


def test_the_user_names_files(folder):
    text = Path("some.txt")
    text.write_text("to be or not to be, " * 40)
    settings = ["--set", 'data.files=["some.txt"]', "--set", "training.steps=1", "--set", "training.sample=0"]
    result = start(1, "small.toml", "--grid", "data=1", "--tensor", "none", *settings)
    assert result.returncode == 0, result.stderr
    assert "720 bytes of text, 80 held out" in result.stdout


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.clip", "0.5"),
        ("training.seed", "7"),
        ("training.checkpoint_every", "4"),
        ("training.microbatches", "2"),
        ("parallel.schedule", '"gpipe"'),
        ("parallel.grid", "{col = 2}"),
    ],
)
def test_ranks_with_other_configurations_are_refused_before_they_communicate(key, value):
    rank = MPI.COMM_WORLD.rank
    config = load("demo", [f"{key}={value}"] if rank else [])
    with pytest.raises(ConfigError, match=rf"ranks 0 and 1 differ in {key}: .* on rank 0, .* on rank 1"):
        make_grid(config)


@pytest.mark.ranks(2)
def test_ranks_with_other_options_are_refused():
    options = {"overwrite": MPI.COMM_WORLD.rank == 1}
    with pytest.raises(ConfigError, match="ranks 0 and 1 differ in overwrite: False on rank 0, True on rank 1"):
        make_grid(load("demo"), **options)
