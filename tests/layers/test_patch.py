"""Convolutions, patches and pooling equal PyTorch's, forward and every gradient, in every mode."""

import numpy as np
import pytest
from reference import image_case as case
from reference.modes import every_mode, few, parallelism

from colossal_mpi import Layout, OptionError, ShapeError, from_global, random
from colossal_mpi.layers import Context
from colossal_mpi.layers.layer import Chain
from colossal_mpi.layers.patch import Conv2d, PatchEmbedding
from colossal_mpi.layers.pooling import FirstPool, MeanPool
from tests.cases import block_of, host

prepared_by = pytest.mark.prepare(case.prepare)
KERNELS = {name: options["kernel"] for name, options in case.CONVOLUTIONS.items()}
PATCH = 2


def check(grid, layer, name, prepared):
    exact = np.load(prepared / "images.npz")
    data = [axis for axis in grid.axes if axis == "data"]
    x = from_global(case.IMAGES, grid, Layout(data, None, None, None))
    for parameter in layer.parameters():
        whole = case.weights(3, KERNELS.get(name, PATCH), case.OUTPUTS)[parameter.name.split(".")[-1]]
        parameter.value = from_global(whole, grid, parameter.value.layout)
    y, cache = layer.forward(x, Context())
    later = []
    dx = layer.backward(from_global(case.cotangent(y.shape), grid, Layout(*[None] * y.ndim)), cache, later)
    for work in later:
        work()
    assert dx.layout == x.layout
    results = {"y": y, "x": dx} | {q.name.split(".")[-1]: q.reduce() for q in layer.parameters()}
    scale = max(abs(exact[f"{name}/{key}"]).max() for key in results)
    for key, array in results.items():
        whole = exact[f"{name}/{key}"]
        tolerance = 1e-10 * max(abs(whole).max(), 1e-3 * scale)
        assert np.max(abs(host(array) - block_of(whole, array.layout, grid)), initial=0) <= tolerance, key


@prepared_by
@every_mode
@pytest.mark.parametrize("into", ["inside", "stream"])
def test_convolution_equals_pytorch(grid, prepared, into):
    for name, options in case.CONVOLUTIONS.items():
        kernel, rest = options["kernel"], {k: v for k, v in options.items() if k != "kernel"}
        layer = Conv2d(3, case.OUTPUTS, kernel, parallelism(grid), "conv", into=into, dtype="float64", **rest)
        check(grid, layer, name, prepared)


@prepared_by
@every_mode
def test_patches_and_pooling_equal_pytorch(grid, prepared):
    p = parallelism(grid)

    def patches(**options):
        return PatchEmbedding(3, PATCH, case.OUTPUTS, p, "patches", dtype="float64", **options)

    check(grid, patches(), "patches", prepared)
    check(grid, patches(class_token=True), "token", prepared)
    check(grid, Chain(patches(class_token=True), FirstPool(p)), "head-first", prepared)
    check(grid, Chain(patches(class_token=True), MeanPool(p)), "head-mean", prepared)


@few
def test_images_that_do_not_fit_are_refused(grid):
    layer = Conv2d(3, 2, 4, parallelism(grid), "conv")
    for shape in ((2, 4, 7, 7), (2, 3, 3, 7), (2, 3, 7)):
        x = random.normal(shape, grid, Layout(*[None] * len(shape)), 0, "x")
        with pytest.raises(ShapeError, match=r"conv of images .* with c=3"):
            layer.forward(x, Context())
    with pytest.raises(OptionError, match="kernel and stride must be 1 or more"):
        Conv2d(3, 2, 4, parallelism(grid), "conv", stride=0)
