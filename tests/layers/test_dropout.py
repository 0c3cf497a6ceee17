"""Dropout masks do not depend on grid, microbatches or repetition, and drop at their rate."""

import array_api_strict as strict
import numpy as np
import pytest

from colossal_mpi import DistArray, Layout, OptionError, distarray, from_global, random
from colossal_mpi.layers import Context
from colossal_mpi.layers.dropout import Dropout, DropPath
from tests.cases import block_of, host
from tests.cases import layouts as every_layout
from tests.reference.modes import every_mode, few, parallelism

SHAPE = (7, 5, 9)
KINDS = pytest.mark.parametrize("kind", [Dropout, DropPath])


def expected(kind, shape=SHAPE, rate=0.3, step=4, sample=0, seed=2):
    """Return the global array of ones after dropout."""
    masked = shape if kind is Dropout else shape[:1]
    box = [(sample, sample + shape[0]), *[(0, n) for n in masked[1:]]]
    kept = random.mask_block(box, masked, seed, f"drop/{step}", rate)
    return np.ones(shape) * kept.reshape(*masked, *[1] * (len(shape) - len(masked))) / (1 - rate)


@KINDS
@every_mode
def test_mask_is_one_global_array_in_every_layout(grid, kind):
    layer, axes = kind(0.3, "drop", seed=2), [axis for axis, n in grid.axes.items() if n > 1]
    whole = expected(kind)
    for layout in every_layout(3, axes)[::5]:
        ones = distarray.full(SHAPE, 1.0, grid, layout)
        y, cache = layer.forward(ones, Context(step=4))
        dx = layer.backward(ones, cache)
        assert y.layout == layout
        held = not any(grid.coords[axis] for axis in layout.partial)
        assert np.array_equal(host(y), block_of(whole, layout, grid) * held)
        assert np.array_equal(host(dx), block_of(whole, layout, grid))


@KINDS
@few
def test_microbatches_have_the_masks_of_the_whole_batch(grid, kind):
    layer, layout, whole = kind(0.3, "drop", seed=2), parallelism(grid).stream(), expected(kind)
    for first, last in ((0, 3), (3, 4), (4, 7)):
        ones = distarray.full((last - first, *SHAPE[1:]), 1.0, grid, layout)
        y, _ = layer.forward(ones, Context(step=4, sample=first))
        assert np.array_equal(host(y), block_of(whole[first:last], layout, grid))


@KINDS
def test_masks_differ_by_step_name_seed_and_sample_and_nothing_else(kind):
    masks = [
        expected(kind, (64, 5, 9), **options)
        for options in ({}, {"step": 5}, {"seed": 3}, {"sample": 64}, {"rate": 0.31})
    ]
    assert [np.array_equal(masks[0] > 0, mask > 0) for mask in masks[1:4]] == [False] * 3
    assert np.all((masks[0] > 0) >= (masks[4] > 0))  # a larger rate drops more of the same order


@KINDS
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_as_many_elements_are_dropped_as_the_rate_says(kind, rate):
    shape = (1 << 14, 3, 5)
    kept = expected(kind, shape, rate) > 0
    n = kept.size if kind is Dropout else shape[0]
    assert abs(kept.mean() - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / n)
    if kind is Dropout and rate:
        columns, rows = kept.mean((0, 1)), kept.mean((0, 2))
        bound = 5 * np.sqrt(rate * (1 - rate) / (n / 5))
        assert abs(columns - (1 - rate)).max() <= bound
        assert abs(rows - (1 - rate)).max() <= bound
        pairs = (kept[..., 1:] & kept[..., :-1]).mean()
        assert abs(pairs - (1 - rate) ** 2) <= 5 * np.sqrt((1 - rate) ** 2 / n)


@KINDS
@few
@pytest.mark.parametrize("options", [(0.0, True), (0.3, False)], ids=["rate-0", "evaluated"])
def test_nothing_is_dropped_at_rate_0_or_out_of_training(grid, kind, options):
    rate, train = options
    x = random.normal(SHAPE, grid, parallelism(grid).stream(), 0, "x")
    layer = kind(rate, "drop")
    y, cache = layer.forward(x, Context(train=train))
    assert y is x
    assert layer.backward(x, cache) is x
    assert not any(isinstance(item, DistArray) for item in cache)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(OptionError, match="drop: rate=.*: a dropout rate must be from 0 to below 1"):
        Dropout(rate, "drop")


@pytest.mark.parametrize("box", [((3, 5), (0, 5), (2, 9)), ((0, 0), (0, 5), (0, 9)), ((0, 2), (1, 4), (3, 3))])
def test_blocks_of_masks_of_another_library_are_the_same(box):
    whole = random.mask_block([(0, n) for n in SHAPE], SHAPE, 0, "x", 0.4)
    block = random.mask_block(box, SHAPE, 0, "x", 0.4, strict)
    assert np.array_equal(np.asarray(block), whole[tuple(slice(*ends) for ends in box)])


@pytest.mark.grids({"col": 2})
def test_float32_stays_float32(grid):
    x = from_global(np.ones(SHAPE, "float32"), grid, Layout(None, None, "col"))
    y, _ = Dropout(0.3, "drop").forward(x, Context())
    assert y.dtype == np.float32
