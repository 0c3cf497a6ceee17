"""Offloading an optimizer's state to host memory changes no bits and leaves no state on the device."""

from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import DistArray, Grid, from_global
from colossal_mpi.layers import Parallelism, Parameter
from colossal_mpi.layers.analysis import TokenData, step_costs
from colossal_mpi.layers.models import GPT, GPTConfig
from colossal_mpi.layers.optim import OPTIMIZERS, AdamW
from colossal_mpi.layout import Layout
from colossal_mpi.offload import to_device, to_host
from colossal_mpi.platform import backend
from colossal_mpi.testing import fake
from tests.cases import host

SHAPES = {"blocks.0.up.weight": (7, 5), "blocks.0.qkv.weight": (5, 3, 2, 4), "norm.gain": (9,)}


def optimizer_of(grid, name, dtype, offload):
    p = Parallelism(grid)
    parameters = [
        Parameter(key, shape, Layout(*[None] * len(shape)), p, std=0.5, dtype=dtype) for key, shape in SHAPES.items()
    ]
    return OPTIMIZERS[name](parameters, offload=offload)


def stepped(optimizer, steps=3):
    """Return weights and state after some steps."""
    for step in range(steps):
        for i, q in enumerate(optimizer.parameters):
            rng = np.random.default_rng([step, i])
            gradient = rng.standard_normal(q.shape) * optimizer.loss_scale
            q.accumulate(from_global(gradient, q.value.grid, q.owned, dtype="float32"))
        optimizer.step(0.03)
    arrays = {q.name: q.value for q in optimizer.parameters}
    return {name: host(array) for name, array in {**arrays, **optimizer.state(), **optimizer.weights()}.items()}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_offloaded_state_has_the_same_bits(name, dtype):
    fake.install()
    exact = stepped(optimizer_of(Grid(MPI.COMM_SELF, device="cpu"), name, dtype, False))
    for device in ("fake", "cpu"):
        grid = Grid(MPI.COMM_SELF, device=device)
        resident, away = (optimizer_of(grid, name, dtype, offload) for offload in (False, True))
        for array in (*away.state().values(), *(w for w in away.weights().values() if dtype == "float16")):
            assert type(array.local) is np.ndarray
        mine = stepped(away)
        for other in (stepped(resident), exact):
            assert mine.keys() == other.keys()
            assert all(np.array_equal(mine[key], other[key]) for key in mine)
        assert any(np.any(mine[key]) for key in away.state())


def test_masters_that_were_loaded_reach_the_device():
    fake.install()
    optimizer = optimizer_of(Grid(MPI.COMM_SELF, device="fake"), "adamw", "float16", True)
    for array in optimizer.weights().values():
        array.local[...] = 0.25
    optimizer.refresh()
    assert all(np.all(host(q.value) == 0.25) for q in optimizer.parameters)


def test_what_is_in_host_memory_stays_there():
    grid = Grid(MPI.COMM_SELF, device="cpu")
    array = DistArray(np.ones(3), (3,), Layout(None), grid)
    assert to_host(array) is array
    assert to_device(array, array.local).local is array.local
    assert backend.device_of(array.local) is None


def test_prediction_leaves_it_out():
    config = GPTConfig(vocabulary=61, layers=2, hidden=40, heads=10, positions=19, dtype="bfloat16")

    def feed(p):
        return TokenData(p, 40, 4, 19, 1, "bfloat16")

    sizes = [
        step_costs(lambda p: GPT(config, p), feed, {}, optimizer=partial(AdamW, offload=flag))[0]
        for flag in (False, True)
    ]
    assert sizes[0].state == 6 * sizes[0].weights
    assert sizes[1].state == 0
    assert sizes[1].peak < sizes[0].peak
