"""Correct predictions are counted wherever classes and labels are cut; of equal logits the first counts."""

import numpy as np
import pytest

from colossal_mpi import Layout, ShapeError, from_global
from colossal_mpi.layers import count_correct
from tests.reference.modes import every_mode, parallelism


@every_mode
@pytest.mark.parametrize("shape", [(7, 5, 9), (7, 3), (2, 1)])
def test_the_count_is_that_of_the_whole_array(grid, shape):
    p, rng = parallelism(grid), np.random.default_rng(0)
    logits, labels = rng.integers(-2, 2, shape).astype(float), rng.integers(-1, shape[-1], shape[:-1])
    expected = int((logits.argmax(-1) == labels).sum())
    letters = "bsv"[-3:] if len(shape) == 3 else "bv"
    cut = p.inside(letters, "v")
    partial = Layout(*[None] * len(shape), partial=[axis for axis, n in grid.axes.items() if n > 1])
    for layout in (cut, Layout(*[None] * len(shape)), partial):
        x, y = from_global(logits, grid, layout), from_global(labels, grid, Layout(*[None] * len(shape[:-1])))
        assert count_correct(x, y) == expected
    assert expected > 0 or shape == (2, 1)


@pytest.mark.grids({"col": 2})
def test_labels_of_another_shape_are_refused(grid):
    x, y = (from_global(np.zeros(shape), grid, Layout(*[None] * len(shape))) for shape in ((3, 4), (4,)))
    with pytest.raises(
        ShapeError, match=r"count_correct: labels \(4,\) must have all but the last dim of the logits \(3, 4\)"
    ):
        count_correct(x, y)
