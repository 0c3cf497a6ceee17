"""A run resumes from a checkpoint of any grid, bitwise on the same grid; old checkpoints are removed."""

import time
from contextlib import contextmanager

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, checkpoint, comm
from colossal_mpi.apps.config import Config
from colossal_mpi.apps.run_directory import RunDirectory
from colossal_mpi.apps.training.trainer import Trainer
from colossal_mpi.checkpoint import checksums
from colossal_mpi.errors import CheckpointError

LOADING = [
    ({}, "none", 0),
    ({"row": 3}, "2d", 0),
    ({"data": 2, "col": 3}, "1d", 3),
    ({"depth": 2, "row": 2, "col": 2}, "3d", 0),
    ({"pipe": 2, "col": 2}, "1d", 0),
]


def config(tensor, zero=0, dropout=0.0):
    return Config.model_validate(
        {
            "model": {"layers": 3, "hidden": 20, "heads": 5, "context": 7, "dropout": dropout},
            "training": {"batch": 6, "microbatches": 2, "warmup": 2, "steps": 30, "evaluate_batches": 1, "lr": 1e-2},
            "parallel": {"tensor": tensor, "zero": zero, "dtype": "float64", "kernels": "reference"},
        }
    )


@contextmanager
def on(axes):
    """Make a grid of the first ranks; the others get None and sleep until the end."""
    size = int(np.prod(list(axes.values()), dtype=int))
    group = MPI.COMM_WORLD.Split(0 if size > MPI.COMM_WORLD.rank else MPI.UNDEFINED)
    yield Grid(group, **axes) if group != MPI.COMM_NULL else None
    barrier = MPI.COMM_WORLD.Ibarrier()
    while not barrier.Test():
        time.sleep(0.01)


def state_of(directory):
    """Read whole arrays, as any HDF5 tool would."""
    import h5py

    with h5py.File(directory / "index.h5") as file:
        return {name: file[name][...] for name in checkpoint.read_manifest(directory)["arrays"]}


def steps(run, first, count):
    return [run.step(step)["loss"] for step in range(first, first + count)]


@pytest.mark.ranks(8)
@pytest.mark.deadline(120)
def test_any_grid_goes_on_from_a_checkpoint_of_another(shared_path):
    grid = Grid(data=2, row=2, col=2)
    run = Trainer(config("2d", zero=1), grid)
    steps(run, 0, 2)
    run.save(shared_path / "step-2", 2)
    exact = steps(run, 2, 2)
    assert len({name.split("/")[0] for name in state_of(shared_path / "step-2")}) == 2  # weights and optimizer
    for number, (axes, tensor, zero) in enumerate(LOADING):
        with on(axes) as some:
            if some is None:
                continue
            other = Trainer(config(tensor, zero), some)
            assert other.restore(shared_path / "step-2") == 2
            again = shared_path / f"again-{number}"
            other.save(again, 2)
            before, after = state_of(shared_path / "step-2"), state_of(again)
            assert list(before) == list(after) or set(before) == set(after)
            assert all(np.array_equal(before[name], after[name]) for name in before)
            assert np.allclose(steps(other, 2, 2), exact, rtol=1e-10, atol=0)
            comm.collect(None, some)


@pytest.mark.grids({"data": 2, "row": 2})
def test_the_same_grid_goes_on_to_the_bit_with_dropout(grid, shared_path):
    run = Trainer(config("2d", zero=1, dropout=0.1), grid)
    steps(run, 0, 3)
    run.save(shared_path / "step-3", 3, background=True)
    losses = []
    for step in range(3, 23):
        losses += steps(run, step, 1)
        run.saving.poll()
    run.saving.finish()
    other = Trainer(config("2d", zero=1, dropout=0.1), grid)
    assert other.restore(shared_path / "step-3") == 3
    assert steps(other, 3, 20) == losses
    for mine, theirs in zip(run._state().items(), other._state().items(), strict=True):
        assert mine[0] == theirs[0]
        assert np.array_equal(mine[1].local, theirs[1].local), mine[0]
    values = checkpoint.read_manifest(shared_path / "step-3")["values"]
    assert {name: value["value"] for name, value in values.items() if name != "training/learning_rate"} == {
        "training/step": 3,
        "training/samples": 18,
        "training/seed": 0,
        "training/finite": True,
        "training/rate": "cosine",
    }
    assert values["training/learning_rate"]["value"] == other.learning_rate(3)


@pytest.mark.grids({"data": 2})
def test_a_damaged_checkpoint_leaves_the_run_as_it_was(grid, shared_path):
    run = Trainer(config("none"), grid)
    steps(run, 0, 1)
    run.save(shared_path / "step-1", 1)
    steps(run, 1, 1)
    kept = {name: array.local.copy() for name, array in run._state().items()}
    if grid.rank == 0:
        data = bytearray((shared_path / "step-1" / "rank00000.h5").read_bytes())
        table = checksums.parts_of(checkpoint.read_manifest(shared_path / "step-1")["files"])
        data[next(part for part in table if part.file == "rank00000.h5" and part.dataset).offset] ^= 16
        (shared_path / "step-1" / "rank00000.h5").write_bytes(data)
    comm.collect(None, grid)
    with pytest.raises(
        CheckpointError, match=r"step-1 is damaged: rank00000.h5 is not the file .* in (weights|optimizer)/"
    ):
        run.restore(shared_path / "step-1")
    assert run.optimizer.steps == 2
    assert all(np.array_equal(array.local, kept[name]) for name, array in run._state().items())


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(0, 0, [1, 2, 3, 4, 5, 6, 7]), (2, 0, [6, 7]), (1, 3, [3, 6, 7]), (9, 2, [1, 2, 3, 4, 5, 6, 7])],
)
def test_old_checkpoints_make_room(tmp_path, last, every, kept):
    directory = RunDirectory(tmp_path)
    for step in range(1, 8):
        directory.checkpoint(step).mkdir(parents=True)
        (directory.checkpoints / f".step-{step - 1:07d}.partial").mkdir()
        directory.keep(step, last, every)
        assert (directory.checkpoints / "latest").resolve() == directory.checkpoint(step).resolve()
    assert [step for step, _ in directory._saved()] == kept
    assert not list(directory.checkpoints.glob(".step*"))


def test_the_checkpoint_that_latest_points_to_stays(tmp_path):
    directory = RunDirectory(tmp_path)
    for step in (1, 5, 9):
        directory.checkpoint(step).mkdir(parents=True)
    directory.keep(1, 1, 0)  # as after a return to the first step
    assert [step for step, _ in directory._saved()] == [1, 9]
    assert (directory.checkpoints / "latest").resolve() == directory.checkpoint(1).resolve()
