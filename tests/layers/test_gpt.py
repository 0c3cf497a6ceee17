"""Loss, gradients and initial weights of a ragged GPT equal one rank's, and one rank's equal PyTorch's."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid
from colossal_mpi.layers.models import GPTConfig
from tests.cases import host
from tests.reference import gpt_case as case

prepared_by = pytest.mark.prepare(case.prepare)


def check(grid, tensor, prepared, **options):
    exact = dict(np.load(prepared / "gradients.npz"))
    loss, model = case.run(grid, tensor, **options)
    reference = float(exact.pop("loss"))
    mine = {p.name: case.block_and_index(p.grad) for p in model.parameters()}
    assert abs(loss - reference) <= 1e-12 * reference
    assert set(mine) == set(exact)
    assert case.difference(mine, exact) <= 1e-10
    weights = np.load(prepared / "weights.npz")
    for parameter in model.parameters():
        block, index = case.block_and_index(parameter.value)
        assert np.array_equal(block, weights[parameter.name][index]), parameter.name


@prepared_by
@pytest.mark.grids({"col": 2}, {"col": 3}, {"col": 5}, {"data": 2, "col": 2}, {"data": 2, "col": 3}, {"col": 8})
def test_1d_equals_one_rank(grid, prepared):
    check(grid, "1d", prepared)


@prepared_by
@pytest.mark.grids(
    {"row": 2, "col": 2},
    {"row": 2, "col": 3},
    {"row": 1, "col": 4},
    {"row": 4, "col": 1},
    {"data": 2, "row": 2, "col": 2},
    {"data": 2, "row": 1, "col": 4},
    {"row": 8},
)
def test_2d_equals_one_rank(grid, prepared):
    check(grid, "2d", prepared)


@prepared_by
@pytest.mark.grids(
    {"depth": 2, "row": 1, "col": 2},
    {"depth": 2, "row": 2, "col": 2},
    {"depth": 3, "row": 2},
    {"data": 2, "depth": 2, "col": 2},
)
def test_25d_equals_one_rank(grid, prepared):
    check(grid, "2.5d", prepared)


@prepared_by
@pytest.mark.grids(
    {"row": 2, "col": 2, "depth": 2},
    {"row": 1, "col": 2, "depth": 3},
    {"row": 3, "depth": 2},
    {"data": 2, "row": 2, "depth": 2},
    {"data": 2, "col": 2, "depth": 2},
)
def test_3d_equals_one_rank(grid, prepared):
    check(grid, "3d", prepared)


@prepared_by
@pytest.mark.smoke
@pytest.mark.grids({"data": 2, "row": 2}, {"row": 2, "col": 2})
def test_2d_with_microbatches_and_stored_operands(grid, prepared):
    check(grid, "2d", prepared, keep_gathered=False, microbatches=3)


@prepared_by
@pytest.mark.grids({"data": 2, "depth": 2})
def test_3d_with_microbatches_and_stored_operands(grid, prepared):
    check(grid, "3d", prepared, keep_gathered=False, microbatches=2)


@prepared_by
def test_one_rank_equals_pytorch(prepared):
    mine, exact = dict(np.load(prepared / "gradients.npz")), dict(np.load(prepared / "torch.npz"))
    loss, reference = float(mine.pop("loss")), float(exact.pop("loss"))
    assert abs(loss - reference) <= 1e-12 * reference
    assert set(mine) == set(exact)
    assert case.difference({name: (g, ...) for name, g in mine.items()}, exact) <= 1e-10
    assert min(abs(g).max() for g in exact.values()) > 0  # no gradient is zero as a whole, so none passes by being zero


@pytest.mark.parametrize("tensor", ["2d", "2.5d", "3d"])
@pytest.mark.grids({"col": 3}, {"row": 2, "col": 3})
def test_axes_larger_than_heads_and_width_leave_blocks_empty(grid, tensor, monkeypatch):
    tiny = GPTConfig(vocabulary=257, layers=1, hidden=2, heads=1, positions=19, inner=1, dtype="float64")
    monkeypatch.setattr(case, "CONFIG", tiny)
    loss, model = case.run(grid, tensor)
    reference, exact = case.run(Grid(MPI.COMM_SELF), None)
    assert abs(loss - reference) <= 1e-12 * reference
    whole = {p.name: host(p.grad) for p in exact.parameters()}
    assert case.difference({p.name: case.block_and_index(p.grad) for p in model.parameters()}, whole) <= 1e-10
