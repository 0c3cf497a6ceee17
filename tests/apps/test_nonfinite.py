"""A NaN is found before weights change, located on every rank, and the run stops, leaves the step out or goes back."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest

from colossal_mpi import Grid, checkpoint, comm
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training import train
from colossal_mpi.apps.training.tasks import StepFeed
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.errors import NonFiniteError
from colossal_mpi.layers.finite import first_place
from colossal_mpi.layers.norm import RMSNorm

GRIDS = [
    {"data": 2},
    {"pipe": 2},
    {"row": 2, "col": 2},
    {"depth": 2, "row": 2, "col": 1},
    {"data": 2, "pipe": 2},
]


def config(axes, zero=0, dtype="float64", run="run", **training):
    tensor = "2.5d" if "depth" in axes else "2d" if "row" in axes else "none"
    batch = 8 if "depth" in axes else 6  # no rank of 2.5d is left without a sample
    steps = {"batch": batch, "microbatches": 2, "warmup": 0, "steps": 6, "evaluate_every": 9, "evaluate_batches": 1}
    return Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 20, "heads": 5, "context": 7},
            "training": {**steps, "sample": 0, "average": 0.5, "checkpoint_every": 2, "keep_last": 2, **training},
            "parallel": {"grid": axes, "tensor": tensor, "zero": zero, "dtype": dtype, "kernels": "reference"},
            "run": {"directory": str(run), "peak_flops": 1e9, "forecast": False, "report": False, "trace_steps": []},
        }
    )


def poison(array):
    """Write a NaN into this rank's block, and return the global index."""
    array.local.flat[array.local.size // 2] = np.nan
    return first_place(array)


def planted(run, where):
    """Plant a NaN on this rank; return what the message says of its place."""
    parameters = run.optimizer.parameters
    target = next(p for p in parameters[len(parameters) // 2 :] if p.value.local.size and p.zeros().local.size)
    if where == "weight":
        return f"weight {target.name} is not finite before the step, first at {poison(target.value)} "
    if where == "moment":
        slot, array = next(iter(run.optimizer.moments[target.name].items()))
        return f"{slot} of {target.name} is not finite before the step, first at {poison(array)} "
    if where == "gradient":
        plain = target.reduce

        def reduce():
            del target.reduce
            places.append(poison(plain()))
            return target.grad

        places, target.reduce = [], reduce
        return f"gradient of {target.name} was not finite after the backward pass, first at "
    norm = [layer for layer in run.pipeline.chunks[-1].walk() if isinstance(layer, RMSNorm)][-1]
    forward, calls = norm.forward, []

    def second(x, ctx):
        y, cache = forward(x, ctx)
        calls.append(1)
        if len(calls) % 2 == 0:
            poison(y)
        return y, cache

    norm.forward = second
    return f"output of {norm.label}, forward pass of microbatch 1, at ("


def state(run):
    return {name: array.local.copy() for name, array in run._state().items()}


def equal(one, other):
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


@pytest.mark.grids(*GRIDS)
@pytest.mark.parametrize("where", ["weight", "moment", "gradient", "activation"])
def test_a_nan_on_one_rank_is_located_on_all_before_weights_change(grid, where):
    for zero in (0, 3) if "data" in grid.axes else (0,):
        run, last = Trainer(config(grid.axes, zero), grid), grid.size - 1
        run.step(0)
        said = comm.share(planted(run, where) if grid.rank == last else None, grid, last)
        before = state(run)
        with pytest.raises(NonFiniteError) as error:
            run.step(1)
        text = str(error.value)
        assert text.startswith("step 2: loss "), text
        assert said in text, (said, text)
        assert f" on rank {last} (" in text, text
        assert text.count("\n") == 0
        assert equal(before, state(run))
        assert error.value.state == (where in ("weight", "moment"))
        assert error.value.repeats == (where == "activation")
        assert len(set(comm.collect(text, grid))) == 1


@pytest.mark.grids({"data": 2})
def test_a_nan_in_half_precision_is_no_overflow_and_an_overflow_is_no_alarm(grid):
    run = Trainer(config(grid.axes, dtype="float16"), grid)
    run.step(0)
    run.optimizer.scaling.value = 2.0**100
    with np.errstate(over="ignore", invalid="ignore"):
        assert run.step(1)["gradient_norm"] is None
    run.optimizer.scaling.value = 2.0**10
    if grid.rank == 1:
        planted(run, "moment")
    with pytest.raises(NonFiniteError, match=r"is not finite before the step, .* on rank 1 \(data=1\)"):
        run.step(2)


@pytest.mark.grids({"data": 2})
def test_no_checkpoint_is_written_of_a_state_that_is_not_finite(grid, shared_path):
    run = Trainer(config(grid.axes), grid)
    run.step(0)
    run.save(shared_path / "step-1", 1)
    assert checkpoint.read_manifest(shared_path / "step-1")["values"]["training/finite"]["value"] is True
    if grid.rank == 1:
        planted(run, "moment")
    with pytest.raises(NonFiniteError, match=r"after step 2: optimizer/.* is not finite, first at .* on rank 1 "):
        run.save(shared_path / "step-2", 2)
    comm.collect(None, grid)
    assert not (shared_path / "step-2").exists()
    assert (shared_path / "latest").resolve().name == "step-1"


BAD = 5
"""The number of the first step, from 1, whose samples give a NaN."""


@pytest.fixture
def bad_samples(monkeypatch):
    """Let the loss of the samples of one step be NaN, whichever step takes them."""
    plain = StepFeed.loss

    def loss(feed, y, microbatch):
        share, cache = plain(feed, y, microbatch)
        return (np.nan if feed.first == (BAD - 1) * feed.size else share), cache

    monkeypatch.setattr(StepFeed, "loss", loss)


def trained(made, grid, path):
    """Train on a grid; return the trainer and what rank 0 printed."""
    run, directory = Trainer(made, grid), RunDirectory(path)
    with comm.agreed(grid):
        if grid.rank == 0:
            directory.create(made, False)
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            assert train._train(run, directory, 0, 0, None) == 0
    finally:
        directory.release()
        comm.collect(None, grid)
    return run, out.getvalue()


RUNS = [{"data": 2}, {"pipe": 2}, {"row": 2, "col": 2}]


@pytest.mark.grids(*RUNS)
@pytest.mark.deadline(120)
def test_a_step_left_out_is_as_if_its_batch_had_not_been_there(grid, shared_path, bad_samples):
    path = shared_path / "run"
    run, out = trained(config(grid.axes, run=path, nonfinite="skip"), grid, path)
    exact = Trainer(config(grid.axes), grid)
    for step in (0, 1, 2, 3, 5):
        exact.step(step)
    assert equal(state(run), state(exact))
    assert [row["step"] for row in RunDirectory(path).rows()] == [1, 2, 3, 4, 6]
    if grid.rank == 0:
        assert "step 5: loss nan" in out
        assert "first in the loss of microbatch 0" in out
        assert "the step is left out" in out


@pytest.mark.grids(*RUNS)
@pytest.mark.deadline(120)
def test_a_rollback_goes_on_from_a_checkpoint_with_other_samples(grid, shared_path, bad_samples):
    path = shared_path / "run"
    made = config(grid.axes, run=path, nonfinite="rollback", rollback_steps=2, keep_last=9)
    run, out = trained(made, grid, path)
    exact = Trainer(config(grid.axes), grid)
    exact.step(0)
    exact.step(1)
    exact.move_on(2, 30)
    for step in (2, 3, 4, 5):
        exact.step(step)
    assert equal(state(run), state(exact))
    assert [row["samples"] for row in RunDirectory(path).rows()] == [6, 12, 36, 42, 48, 54]
    assert RunDirectory(path).saved() == [2, 4, 6]
    if grid.rank == 0:
        assert "goes back to the checkpoint after step 2 and on with the samples from 30 on" in out


@pytest.mark.grids(*RUNS)
def test_a_stop_says_how_to_go_on_and_that_works(grid, shared_path, bad_samples):
    path = shared_path / "run"
    with pytest.raises(NonFiniteError) as error:
        trained(config(grid.axes, run=path), grid, path)
    said = (
        f"the newest checkpoint ends in the same: go on from the one after step 2 with other samples and a lower rate: "
        f"--resume {path} --set training.nonfinite=rollback --set training.rollback_steps=2 --set training.lr=0.0001"
    )
    assert said in str(error.value)
    assert RunDirectory(path).latest().name == "step-0000004"
    made = config(grid.axes, run=path, nonfinite="rollback", rollback_steps=2, lr=1e-4)
    run = Trainer(made, grid)
    assert run.restore(RunDirectory(path).latest()) == 4
    assert train._train(run, RunDirectory(path), 4, 0, None) == 0
    assert RunDirectory(path).latest().name == "step-0000006"


def test_a_state_that_is_not_finite_is_not_left_out(tmp_path):
    grid = Grid(data=1)
    made = config(grid.axes, run=tmp_path / "run", nonfinite="skip")
    run, directory = Trainer(made, grid), RunDirectory(tmp_path / "run")
    directory.create(made, False)
    step = run.step

    def plant(number, meanwhile=None):
        if number == 3:
            planted(run, "moment")
        return step(number, meanwhile)

    run.step = plant
    with pytest.raises(NonFiniteError, match=r"leaving out a step does not mend it; go on from .* after step 2 with"):
        train._train(run, directory, 0, 0, None)
    directory.release()
