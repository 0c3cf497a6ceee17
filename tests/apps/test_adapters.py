"""Adapters of a run: the base stays as it is, checkpoints resume, merged weights give the same logits."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, checkpoint, from_global
from colossal_mpi.apps import config as configs
from colossal_mpi.apps import training
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.layers import Context, Parallelism, models
from tests.cases import assemble, host
from tests.command_line import RUN, call

SELF = Grid(MPI.COMM_SELF)
TINY = (
    """
[model]
kind = "llama"
layers = 1
hidden = 8
heads = 2
groups = 1
inner = 12
context = 8
[training]
steps = 2
batch = 4
microbatches = 2
evaluate_batches = 1
sample = 0
[parallel]
kernels = "reference"
dtype = "float64"
"""
    + RUN
)
LORA = (
    "--set",
    "adapter.rank=2",
    "--set",
    'adapter.targets=["*.*"]',
    "--set",
    "adapter.base=run",
    "--set",
    "run.directory=tuned",
)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY)
    assert call("train", "tiny.toml").returncode == 0
    return tmp_path


def values(source):
    model, _, _ = training.load_model(source, SELF, "none")
    return {q.name: host(q.value) for q in model.parameters()}


def logits(model):
    ids = from_global(np.arange(8)[None] * 7, SELF, model.layers[0].ids)
    return host(model.forward(ids, Context(train=False))[0])


def test_a_run_trains_adapters_alone_and_merges_them(base):
    tuned = call("train", "tiny.toml", *LORA)
    assert tuned.returncode == 0, tuned.stderr
    before, after = values(base / "run"), values(base / "tuned")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert np.abs(after["blocks.0.mlp.up.lora_b.weight"]).max() > 1e-5
    arrays = checkpoint.read_manifest(base / "tuned" / "checkpoints" / "step-0000002")["arrays"]
    states = [name for name in arrays if name.startswith("optimizer/")]
    assert states
    assert all("lora_" in name for name in states)
    assert call("convert", "tuned", "merged", "--to", "hf", "--merge").returncode == 0
    adapted, _, _ = training.load_model(base / "tuned", SELF, "none")
    merged = models.from_pretrained(base / "merged", Parallelism(SELF))
    assert np.abs(logits(merged) - logits(adapted)).max() <= 1e-13


def test_a_resumed_run_ends_like_one_without_a_stop(base):
    rest = ("--set", "training.rate=constant", "--overwrite")
    assert call("train", "tiny.toml", *LORA, *rest, "--set", "training.steps=4").returncode == 0
    whole = values(base / "tuned")
    assert call("train", "tiny.toml", *LORA, *rest).returncode == 0
    done = call("train", "--resume", "tuned", "--set", "training.steps=4")
    assert done.returncode == 0, done.stderr
    assert all(np.array_equal(whole[name], value) for name, value in values(base / "tuned").items())


def test_other_adapters_are_refused_in_one_line(base):
    assert call("train", "tiny.toml", *LORA).returncode == 0
    other = call("train", "--resume", "tuned", "--set", "adapter.rank=3", "--set", "training.steps=3")
    assert "has adapters {'rank': 2" in other.stderr
    none = call("train", "--resume", "run", "--set", "adapter.rank=2", "--set", "training.steps=3")
    assert "has no adapters, and the configuration asks for adapters" in none.stderr
    sizes = call("train", "tiny.toml", *LORA, "--set", "model.inner=16", "--overwrite")
    assert "inner=12, and the configuration makes inner=16" in sizes.stderr
    target = call("train", "tiny.toml", *LORA, "--set", 'adapter.targets=["*.gate"]', "--overwrite")
    assert "adapters for *.gate: no product of the Llama has such a name" in target.stderr
    plain = call("convert", "tuned", "merged", "--to", "hf")
    assert "give --merge" in plain.stderr
    assert all(one.returncode for one in (other, none, sizes, target, plain))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.grids({"data": 2, "col": 2}, {"pipe": 2, "row": 1, "col": 2})
def test_a_step_on_a_grid_equals_that_of_one_rank(grid, dtype):
    table = configs.validate({**_table(dtype)}, "x").model_dump()

    def updated(on, zero):
        tensor = "2d" if "row" in on.axes else "1d" if "col" in on.axes else "none"
        parallel = table["parallel"] | {"grid": dict(on.axes), "tensor": tensor, "zero": zero}
        trainer = Trainer(configs.validate(table | {"parallel": parallel}, "x"), on)
        start = {q.name: assemble(q.value) for q in trainer.optimizer.parameters if q.name.endswith("lora_a.weight")}
        trainer.gradients(0)
        return start, {q.name: assemble(q.reduce()) for q in trainer.optimizer.parameters}

    (drawn, gradients) = updated(SELF, 0)
    for zero in (0, 3):
        start, found = updated(grid, zero)
        assert all(np.array_equal(drawn[name], value) for name, value in start.items())
        # a gradient of the first block has gone through some twenty values that are rounded to 11 bits
        bound = 1e-10 if dtype == "float64" else 20 * 2.0**-10
        for name, value in found.items():
            assert np.abs(value - gradients[name]).max() <= bound * max(np.abs(gradients[name]).max(), 1e-3), name


def _table(dtype):
    model = {"kind": "llama", "layers": 2, "hidden": 8, "heads": 2, "groups": 1, "inner": 12, "context": 8}
    training_ = {"steps": 2, "batch": 4, "microbatches": 2, "evaluate_batches": 1}
    return {
        "model": model,
        "training": training_,
        "parallel": {"kernels": "reference", "dtype": dtype},
        "adapter": {"rank": 2},
    }
