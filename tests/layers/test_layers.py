"""Every layer of the table equals PyTorch's in every mode: output, cotangent of the input and each gradient."""

import numpy as np
import pytest
from mpi4py import MPI
from reference import layer_case as case
from reference.modes import every_mode, parallelism

from colossal_mpi import Grid
from colossal_mpi.layers import Parallelism
from tests.cases import host


def check(grid, exact, sizes=case.SIZES, zeros=False):
    p = parallelism(grid)
    off = {name: case.distance(case.run(name, p, sizes)[-1], exact(name), zeros) for name in case.CASES}
    assert not {name: distance for name, distance in off.items() if not distance <= 1e-10}


@pytest.mark.prepare(case.prepare)
@every_mode
def test_layers_equal_torch(grid, prepared):
    check(grid, lambda name: dict(np.load(prepared / f"{name}.npz")))


@pytest.mark.grids({"col": 3}, {"row": 2, "col": 3}, {"depth": 2, "row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2})
def test_axes_larger_than_any_size_leave_blocks_empty(grid):
    tiny = dict.fromkeys(case.SIZES, 1) | {"t": 3, "p": 2, "s": 2, "h": 2, "f": 2, "v": 2, "y": 7, "x": 5}
    alone = Parallelism(Grid(MPI.COMM_SELF))

    def exact(name):
        return {key: host(array) for key, array in case.run(name, alone, tiny)[-1].items()}

    check(grid, exact, tiny, zeros=True)
