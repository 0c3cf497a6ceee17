"""A resumed run goes on with the sample after the last one, whatever has changed."""

import json

import pytest

from colossal_mpi import checkpoint
from colossal_mpi.apps.training.tasks import CausalLanguage
from tests.command_line import call

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
