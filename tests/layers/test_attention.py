"""Self-attention of every kind equals PyTorch's in every mode."""

import numpy as np
import pytest

from colossal_mpi import from_global
from colossal_mpi.errors import DTypeError, ShapeError
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention.self_attention import SelfAttention
from tests.reference import attention_case as case
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import every_cut, few

prepared_by = pytest.mark.prepare(case.prepare)


def check(grid, prepared, name, **options):
    exact = dict(np.load(prepared / f"{name}.npz"))
    results, _ = case.run(grid, name, **options)
    assert set(results) == set(exact)
    assert difference({key: block_and_index(a) for key, a in results.items()}, exact) <= 1e-10


@prepared_by
@pytest.mark.parametrize("name", case.CASES)
@every_cut
def test_equals_torch(grid, prepared, name):
    check(grid, prepared, name)


@prepared_by
@few
def test_operands_that_are_gathered_again_change_nothing(grid, prepared):
    check(grid, prepared, "groups-1", keep_gathered=False)


@pytest.mark.grids({}, {"row": 2, "col": 2})
def test_a_mask_of_another_shape_or_type_is_refused(grid):
    p = Parallelism(grid, "2d")
    layer = SelfAttention(case.H, case.A, p, "attention", dtype="float64")
    x = from_global(case.X, grid, p.stream())
    short, numbers = (from_global(a, grid, p.tokens()) for a in (case.MASK[:, :-1], case.MASK.astype("int64")))
    with pytest.raises(ShapeError, match=r"the mask must be of shape \[b, s\] = \[7, 9\], .*; it is \[7, 8\]"):
        layer.forward(x, Context(mask=short))
    with pytest.raises(DTypeError, match="the mask must be bool, true where a token counts; it is int64"):
        layer.forward(x, Context(mask=numbers))
    with pytest.raises(
        ShapeError, match=r"positions must be of shape \[s\] = \[9\] or \[b, s\] = \[7, 9\]; they are \[8\]"
    ):
        layer.forward(x, Context(positions=np.arange(8)))
    with pytest.raises(DTypeError, match="positions must be integers; they are float64"):
        layer.forward(x, Context(positions=np.linspace(0, 1, 9)))
