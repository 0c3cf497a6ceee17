"""A resumed run goes on with the sample after the last one, and only with the data that it had."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import checkpoint
from colossal_mpi.apps import data
from colossal_mpi.apps.training.tasks import CausalLanguage
from colossal_mpi.grid import Grid
from tests.command_line import call

SELF = Grid(MPI.COMM_SELF)

TINY = """
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
[run]
directory = "run"
peak_flops = 1e9
forecast = false
report = false
"""


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
