"""The shipped demo on pipe x data x col has the losses of one rank, with every schedule and with overlap."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, ledger
from colossal_mpi.apps import config as configs
from colossal_mpi.apps.training.trainer import Trainer

STEPS = 2


def losses(grid, *settings):
    """Return loss and gradient norm of some steps, and the record of the last."""
    put = ["parallel.dtype=float64", "parallel.kernels=reference", "training.microbatches=4", *settings]
    put.append(configs.grid_setting(dict(grid.axes) or {"data": 1}))
    trainer, made = Trainer(configs.load("demo", put), grid), []
    for step in range(STEPS):
        with ledger.record() as moved:
            row = trainer.step(step)
        made.append([row["loss"], row["gradient_norm"]])
    return made, moved


def prepare(path):
    (path / "exact.json").write_text(json.dumps(losses(Grid(MPI.COMM_SELF), "parallel.tensor=none")[0]))


@pytest.mark.deadline(120)
@pytest.mark.prepare(prepare)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
@pytest.mark.grids({"pipe": 2, "data": 2, "col": 2})
def test_the_demo_trains(grid, prepared, schedule):
    chunks = 2 if schedule == "interleaved" else 1
    settings = [f"parallel.schedule={schedule}", f"parallel.virtual_stages={chunks}", "parallel.bucket=65536"]
    made, moved = losses(grid, "parallel.tensor=1d", *settings)
    assert np.allclose(made, json.loads((prepared / "exact.json").read_text()), rtol=1e-10, atol=0)
    buckets = [event for event in moved.events if event.axes == ("data",) and event.posted > event.begun]
    sends = [event for event in moved.events if event.op == "send"]
    assert len(buckets) > 4
    assert len(sends) >= 4
