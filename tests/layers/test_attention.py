"""Self-attention of every order and padding equals PyTorch's in every mode."""

import numpy as np
import pytest
from reference import attention_case as case
from reference.gpt_case import block_and_index, difference

from colossal_mpi import from_global
from colossal_mpi.errors import DTypeError, ShapeError
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention import SelfAttention

prepared_by = pytest.mark.prepare(case.prepare)
each_case = pytest.mark.parametrize("name", case.CASES)


def check(grid, tensor, prepared, name):
    exact = dict(np.load(prepared / f"{name}.npz"))
    results, _ = case.run(grid, tensor, name)
    assert set(results) == set(exact)
    assert difference({key: block_and_index(a) for key, a in results.items()}, exact) <= 1e-10


@prepared_by
@each_case
@pytest.mark.grids({"data": 1}, {"data": 2}, {"data": 8})
def test_one_rank_and_data_equal_torch(grid, prepared, name):
    check(grid, None, prepared, name)


@prepared_by
@each_case
@pytest.mark.grids({"col": 2}, {"col": 3}, {"data": 2, "col": 2})
def test_1d_equals_torch(grid, prepared, name):
    check(grid, "1d", prepared, name)


@prepared_by
@each_case
@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 3}, {"data": 2, "row": 2, "col": 2})
def test_2d_equals_torch(grid, prepared, name):
    check(grid, "2d", prepared, name)


@prepared_by
@each_case
@pytest.mark.grids({"depth": 2, "row": 1, "col": 2}, {"depth": 2, "row": 2, "col": 2})
def test_25d_equals_torch(grid, prepared, name):
    check(grid, "2.5d", prepared, name)


@prepared_by
@each_case
@pytest.mark.grids({"row": 2, "col": 2, "depth": 2}, {"row": 1, "col": 2, "depth": 2}, {"row": 2, "col": 1, "depth": 2})
def test_3d_equals_torch(grid, prepared, name):
    check(grid, "3d", prepared, name)


@pytest.mark.grids({"data": 1}, {"row": 2, "col": 2})
def test_a_mask_of_another_shape_or_type_is_refused(grid):
    p = Parallelism(grid, "2d")
    layer = SelfAttention(case.H, case.A, p, "attention", dtype="float64")
    x = from_global(case.X, grid, p.stream())
    short, numbers = (from_global(a, grid, p.tokens()) for a in (case.MASK[:, :-1], case.MASK.astype("int64")))
    with pytest.raises(ShapeError, match=r"the mask must be of shape \[b, s\] = \[7, 9\], .*; it is \[7, 8\]"):
        layer.forward(x, Context(mask=short))
    with pytest.raises(DTypeError, match="the mask must be bool, true where a key counts; it is int64"):
        layer.forward(x, Context(mask=numbers))
