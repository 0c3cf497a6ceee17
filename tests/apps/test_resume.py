"""A resumed run goes on with the sample after the last one, and only with the data that it had."""

import errno
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import checkpoint
from colossal_mpi.apps import data
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training.tasks import CausalLanguage
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.grid import Grid
from tests.command_line import RUN, call

SELF = Grid(MPI.COMM_SELF)

TINY = (
    """
[model]
layers = 1
hidden = 8
heads = 2
context = 8
[training]
steps = 3
batch = 6
microbatches = 2
evaluate_batches = 1
sample = 0
[parallel]
kernels = "reference"
"""
    + RUN
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path / "run"


def train(*words, **settings):
    """Train, or resume, with settings ``section__key=value``."""
    given = [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    return call("train", *words, *given)


def resumed(**settings):
    done = train("--resume", "run", **settings)
    assert done.returncode == 0, done.stderr
    return done


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples(run, step):
    return checkpoint.read_manifest(run / "checkpoints" / f"step-{step:07d}")["values"]["training/samples"]["value"]


def test_each_sample_is_taken_once_whatever_batches_the_parts_of_a_run_have(run, monkeypatch):
    taken, batch = [], CausalLanguage.batch

    def record(task, first, stop):
        taken.extend(range(first, stop))
        return batch(task, first, stop)

    monkeypatch.setattr(CausalLanguage, "batch", record)
    assert train("tiny.toml").returncode == 0
    told = resumed(training__steps=5, training__batch=4)
    resumed(training__steps=7, training__batch=9, training__microbatches=3)
    assert taken == list(range(3 * 6 + 2 * 4 + 2 * 9))
    assert [samples(run, step) for step in (3, 5, 7)] == [18, 26, 44]
    assert [row["samples"] for row in rows(run)] == [6, 12, 18, 22, 26, 35, 44]
    line = "goes on after step 3 and 18 samples; changed: training.steps from 3 to 5, training.batch from 6 to 4"
    assert line in told.stdout


def write(path, count, vary=0):
    """Write a text of some lines, of which one may be changed."""
    path.write_text("".join(f"line {i + 7 * (i == vary > 0):5d} of the text\n" for i in range(count)))


def test_a_run_does_not_go_on_with_other_data_unless_that_is_allowed_once(run):
    text = run.parent / "text"
    write(text, 400)
    assert train("tiny.toml", data__files='["text"]').returncode == 0
    for count, vary, said in (
        (800, 0, "then (8,280 bytes of text, 920 held out; "),
        (400, 200, "as many, of other content"),
    ):
        write(text, count, vary)
        refused = train("--resume", "run", training__steps=4)
        assert refused.returncode != 0
        assert f"the data are not those of {run}/checkpoints/step-0000003: {said}" in refused.stderr
        assert "--set data.changed=true" in refused.stderr
    allowed = resumed(training__steps=4, data__changed="true")
    assert "changed: training.steps from 3 to 4, data, as many, of other content" in allowed.stdout
    assert "changed = false" in (run / "config.toml").read_text()
    resumed(training__steps=5)
    text.rename(run.parent / "elsewhere")
    resumed(training__steps=6, data__files='["elsewhere"]')
    other_split = train("--resume", "run", training__steps=7, data__validation=0.2)
    assert "now (7,360 bytes of text, 1,840 held out; " in other_split.stderr


def test_the_digest_sees_each_token_and_pixel_and_the_ends_of_large_files(tmp_path, monkeypatch):
    tokens = np.arange(50_000) % 251

    def of(values):
        np.save(tmp_path / "tokens.npy", values)
        return data.read_corpus([str(tmp_path / "tokens.npy")], 0.1, 8, SELF).digest

    changed = tokens.copy()
    changed[31_111] += 1
    assert of(tokens) == of(tokens.astype(np.uint8))  # the dtype of a file is no matter
    assert len({of(tokens), of(changed), of(tokens[:-1])}) == 3
    monkeypatch.setattr("colossal_mpi.apps.data.digest.WHOLE", 1000)
    monkeypatch.setattr("colossal_mpi.apps.data.digest._STRETCH", 4)
    for place in (0, -1):
        changed = tokens.copy()
        changed[place] += 1
        assert of(changed) != of(tokens)
    images = {"images": np.arange(40).reshape(10, 2, 2), "labels": np.arange(10) % 2}
    np.savez(tmp_path / "one.npz", **images)
    np.savez(tmp_path / "two.npz", **{**images, "labels": images["labels"][::-1]})
    found = [
        data.read_images([str(tmp_path / f"{name}.npz")], s, SELF).digest
        for name, s in (("one", 0.2), ("two", 0.2), ("one", 0.3))
    ]
    assert len(set(found)) == 3


COPIES = {
    "directory": lambda latest, saved: shutil.copytree(saved, latest),
    "directory alone": lambda latest, saved: saved.rename(latest),
    "interrupted copy": lambda latest, _: latest.mkdir(),
    "file": lambda latest, _: latest.write_text("step-0000003\n"),
    "damaged file": lambda latest, _: latest.write_bytes(b"\0\xff"),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_a_copy_without_the_link_latest_is_resumed_and_gets_it_again(run, copy):
    assert train("tiny.toml", training__checkpoint_every=2).returncode == 0
    latest = run / "checkpoints" / "latest"
    target = latest.resolve()
    latest.unlink()
    copy(latest, target)
    for steps in (5, 6):
        resumed(training__steps=steps)
        assert latest.is_symlink()
        assert latest.resolve().name == f"step-{steps:07d}"
        assert target.is_dir()
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_copy_with_a_directory_latest_can_be_replaced(run):
    assert train("tiny.toml").returncode == 0
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    shutil.copytree(run / "checkpoints" / "step-0000003", latest)
    assert train("tiny.toml", "--overwrite").returncode == 0
    assert latest.resolve().name == "step-0000003"


def test_without_symlinks_latest_is_a_file_with_the_name(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    directory = RunDirectory(tmp_path)
    directory.config.write_text("")
    directory.checkpoint(7).mkdir(parents=True)
    directory.checkpoint(9).mkdir()
    checkpoint.point_latest(directory.checkpoint(7))
    assert directory.latest() == directory.checkpoint(7).resolve()


DAMAGED = b'\0\0\0\0\n\n{"step": 5, "lo\nnull\n[1]\n{"step": "x"}\n\xff\n'


def test_damaged_lines_of_the_metrics_and_a_damaged_trace_are_left_out(run):
    assert train("tiny.toml").returncode == 0
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(DAMAGED + whole + DAMAGED + b"\0\0")
    (run / "trace.json").write_text('{"traceEv')
    shown = call("report", run)
    assert shown.returncode == 0, shown.stderr
    assert f"{metrics}: 14 damaged lines of 17 left out" in shown.stderr
    assert "trace.json is damaged: the report has no timeline" in shown.stderr
    assert "14 damaged lines of 17 left out" in resumed(training__steps=4).stderr
    assert metrics.read_bytes().startswith(whole)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_a_run_that_diverges_is_told_to_resume_only_if_it_has_a_checkpoint(run, monkeypatch):
    gradients = Trainer.gradients
    monkeypatch.setattr(Trainer, "gradients", lambda *step: gradients(*step) if step[1] < 1 else math.nan)
    first = train("tiny.toml").stderr
    assert "step 2: loss nan" in first
    assert "there is no checkpoint yet: start it anew with a lower rate: --overwrite --set training.lr=0.0001" in first
    assert "run has no checkpoint yet: start it anew with --overwrite" in train("--resume", "run").stderr
    assert "a run already, which has no checkpoint: replace it with --overwrite" in train("tiny.toml").stderr
    later = train("tiny.toml", "--overwrite", training__checkpoint_every=1).stderr
    assert "at fault; go on from the checkpoint after step 1: --resume run" in later  # it does not come again


def test_a_damaged_checkpoint_names_the_newest_that_is_whole_and_the_run_goes_on_from_that(run):
    assert train("tiny.toml", training__steps=6, training__checkpoint_every=2).returncode == 0
    whole = (run / "checkpoints" / "step-0000006" / "rank00000.h5").read_bytes()
    with (run / "checkpoints" / "step-0000006" / "rank00000.h5").open("r+b") as file:
        file.truncate(100)
    (run / "checkpoints" / "step-0000004" / "manifest.json").write_text("")
    refused = train("--resume", "run", training__steps=7)
    assert refused.returncode == 1
    assert "rank00000.h5 has 100 of its" in refused.stderr
    advice = "the newest that is whole is step-0000002: go on from it with --resume run/checkpoints/step-0000002"
    assert advice in refused.stderr
    assert (run / "checkpoints" / "latest").resolve().name == "step-0000006"
    done = train("--resume", "run/checkpoints/step-0000002", training__steps=6)
    assert done.returncode == 0, done.stderr
    assert "run goes on after step 2: step-0000004, step-0000006 removed" in done.stderr
    assert (run / "checkpoints" / "step-0000006" / "rank00000.h5").read_bytes() == whole
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    assert "no other checkpoint of the run is whole: start it anew with --overwrite" in train("--resume", "run").stderr
