"""Convolution and pooling refuse images that do not fit, and pooling takes the first of equal elements."""

import numpy as np
import pytest

from colossal_mpi import Layout, OptionError, ShapeError, random
from colossal_mpi.layers import Context
from colossal_mpi.layers.conv import Conv2d
from colossal_mpi.layers.kernels import reference as kernels
from colossal_mpi.layers.pooling import AvgPool2d, MaxPool2d
from tests.reference.modes import few, parallelism


@few
def test_images_that_do_not_fit_are_refused(grid):
    layer = Conv2d(3, 2, 4, parallelism(grid), "conv")
    for shape in ((2, 4, 7, 7), (2, 3, 3, 7), (2, 3, 7)):
        x = random.normal(shape, grid, Layout(*[None] * len(shape)), 0, "x")
        with pytest.raises(ShapeError, match=r"conv of images .* with c=3"):
            layer.forward(x, Context())
    with pytest.raises(OptionError, match="kernel and stride must be 1 or more"):
        Conv2d(3, 2, 4, parallelism(grid), "conv", stride=0)


@few
@pytest.mark.parametrize("kind", [MaxPool2d, AvgPool2d])
def test_pools_that_do_not_fit_are_refused(grid, kind):
    for shape in ((2, 4, 2, 7), (2, 3, 7)):
        x = random.normal(shape, grid, Layout(*[None] * len(shape)), 0, "x")
        with pytest.raises(ShapeError, match=rf"{kind.__name__} of images .* no smaller than the kernel \(3, 3\)"):
            kind(3).forward(x, Context())
    for options in (
        {"kernel": 0},
        {"kernel": 2, "stride": 0},
        {"kernel": 2, "padding": 2},
        {"kernel": 2, "padding": -1},
    ):
        with pytest.raises(OptionError, match="kernel and stride must be 1 or more and padding from 0 to half"):
            kind(**options)


def test_the_first_of_equal_elements_is_taken():
    x = np.random.default_rng(0).integers(0, 3, (3, 2, 6, 7)).astype("float64")
    x[0, 0, 2, 3], x[1, 1] = np.nan, -np.inf
    y, which = kernels.max_pool(x, (3, 2), (1, 2), (0, 0))
    for b, c, i, j in np.ndindex(y.shape):
        window = x[b, c, i : i + 3, 2 * j : 2 * j + 2].reshape(-1)
        assert which[b, c, i, j] == window.argmax()
        assert np.array_equal(y[b, c, i, j], window.max(), equal_nan=True)
