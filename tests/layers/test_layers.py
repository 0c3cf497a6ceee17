"""Each layer of the table gives PyTorch's output, cotangent of the input and gradients, in every mode."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout
from colossal_mpi.layers import Parallelism
from tests.cases import assemble, host
from tests.reference import layer_case as case
from tests.reference.modes import every_cut, parallelism


def check(grid, exact, sizes=case.SIZES, zeros=False, keep_gathered=True):
    p = parallelism(grid, keep_gathered)
    off = {name: case.distance(case.run(name, p, sizes)[-1], exact(name), zeros) for name in case.CASES}
    assert not {name: distance for name, distance in off.items() if not distance <= 1e-10}


@pytest.mark.prepare(case.prepare)
@every_cut
def test_layers_equal_torch(grid, prepared):
    check(grid, lambda name: dict(np.load(prepared / f"{name}.npz")))


@pytest.mark.prepare(case.prepare)
@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "depth": 2})
def test_layers_that_keep_stored_operands_equal_torch(grid, prepared):
    check(grid, lambda name: dict(np.load(prepared / f"{name}.npz")), keep_gathered=False)


@pytest.mark.grids({"row": 2, "col": 2}, {"depth": 2, "col": 2}, {"row": 2, "depth": 2})
def test_inputs_may_come_in_any_layout_and_as_partial_sums(grid):
    p, wrong = parallelism(grid), []
    for name in case.CASES:
        layer, x, _, results = case.run(name, p)
        exact = {key: assemble(array) for key, array in results.items()}
        whole, summed = Layout(*[None] * x.ndim), Layout(*[None] * x.ndim, partial=tuple(grid.axes))
        for layout in (whole, *([summed] if "dx" in exact else [])):
            x = x.redistribute(whole).redistribute(layout)
            _, other = case.passes(layer, x, case.CASES[name].ctx(case.SIZES))
            same = "dx" not in exact or other["dx"].layout == whole
            other = {key: array.reduced() for key, array in other.items()}
            wrong += [] if same and case.distance(other, exact) <= 1e-10 else [(name, layout)]
    assert not wrong


@pytest.mark.grids({"col": 3}, {"row": 2, "col": 3}, {"depth": 2, "row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2})
def test_axes_larger_than_any_size_leave_blocks_empty(grid):
    tiny = dict.fromkeys(case.SIZES, 1) | {"t": 3, "p": 2, "s": 2, "h": 2, "f": 2, "v": 2, "y": 7, "x": 5}
    alone = Parallelism(Grid(MPI.COMM_SELF))

    def exact(name):
        return {key: host(array) for key, array in case.run(name, alone, tiny)[-1].items()}

    check(grid, exact, tiny, zeros=True)
