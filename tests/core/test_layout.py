"""Blocks of every layout are balanced, nested and tile the array, and layouts that make no sense are errors."""

import math

import numpy as np
import pytest

from colossal_mpi import Layout, LayoutError
from colossal_mpi.layout import bounds, box_shape, intersect, part, slices
from tests.cases import indices, integers, layouts, some

GRIDS = {"2x3": {"row": 2, "col": 3}, "1x4": {"row": 1, "col": 4}, "2x3x2": {"data": 2, "row": 3, "col": 2}}
SHAPES = [(7, 5), (1, 9), (0, 4), (2, 3, 5), (7,), ()]


def places(sizes):
    return [dict(zip(sizes, index, strict=True)) for index in np.ndindex(*sizes.values())]


def test_parts_are_balanced_and_tile():
    for n in range(12):
        for parts in range(1, 9):
            pieces = [part(n, parts, i) for i in range(parts)]
            lengths = [stop - start for start, stop in pieces]
            assert [i for start, stop in pieces for i in range(start, stop)] == list(range(n))
            assert lengths == [n // parts + 1] * (n % parts) + [n // parts] * (parts - n % parts)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", GRIDS.values(), ids=GRIDS)
def test_blocks_tile_the_array(sizes, shape):
    for layout in some(layouts(len(shape), sizes), 60):
        hits = np.zeros(shape, int)
        for coords in places(sizes):
            hits[tuple(slice(*extent) for extent in layout.box(shape, sizes, coords))] += 1
        assert (hits == math.prod(n for axis, n in sizes.items() if axis not in layout.cut)).all(), layout


@pytest.mark.parametrize("sizes", GRIDS.values(), ids=GRIDS)
def test_boxes_are_those_of_array_split(sizes):
    for layout in some(layouts(2, sizes), 60):
        for coords in places(sizes):
            box = layout.box((7, 5), sizes, coords)
            held = indices((7, 5), layout, sizes, coords)
            assert [list(range(*extent)) for extent in box] == [list(index) for index in held], layout


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_elements_over_any_axes(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 40))
    sizes = {axis: int(rng.integers(1, 6)) for axis in "abc"}
    axes = tuple(str(axis) for axis in rng.permutation(list("abc")))

    pieces = [bounds(n, axes, sizes, dict(zip(axes, at, strict=True))) for at in np.ndindex(*map(sizes.get, axes))]

    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(n))


def test_the_order_of_nesting_matters():
    sizes, coords = {"row": 2, "col": 3}, {"row": 0, "col": 1}
    assert Layout(("row", "col")).box((6,), sizes, coords) == ((1, 2),)
    assert Layout(("col", "row")).box((6,), sizes, coords) == ((2, 3),)
    assert Layout(("row", "col")) != Layout(("col", "row"))


def test_some_blocks_are_empty_where_there_are_more_ranks_than_elements():
    sizes = {"row": 4}
    boxes = [Layout("row", None).box((2, 5), sizes, {"row": i}) for i in range(4)]
    assert [box_shape(box) for box in boxes] == [(1, 5), (1, 5), (0, 5), (0, 5)]


def test_owners_hold_each_element_once():
    sizes = GRIDS["2x3x2"]
    for layout in some(layouts(2, sizes), 60):
        boxes = [layout.box((7, 5), sizes, at) for at in places(sizes) if layout.owner(sizes, at)]
        assert sum(math.prod(box_shape(box)) for box in boxes) == 35, layout


def test_slices_find_a_box_inside_a_block():
    whole, origin, box = integers((7, 5)), ((2, 6), (1, 5)), ((3, 5), (1, 2))
    block = whole[2:6, 1:5]
    assert np.array_equal(block[slices(box, origin)], whole[3:5, 1:2])


@pytest.mark.parametrize("other", [((0, 2), (0, 5)), ((6, 7), (0, 1)), ((4, 4), (2, 3))], ids=str)
def test_boxes_that_do_not_meet_have_nothing_in_common(other):
    box = ((2, 6), (1, 5))
    common = intersect(box, other)
    assert 0 in box_shape(common)
    assert all(0 <= s.start <= s.stop <= 4 for s in slices(common, box))


@pytest.mark.parametrize(
    ("dims", "partial"),
    [(("row", "row"), ()), ((("row", "col"), "row"), ()), (("row", None), ("row",)), ((None,), ("row", "row"))],
    ids=str,
)
def test_an_axis_named_twice_is_an_error(dims, partial):
    with pytest.raises(LayoutError, match=r"Layout\(.*\): axis row is named twice"):
        Layout(*dims, partial=partial)


def test_an_unknown_axis_is_an_error_that_lists_the_axes():
    with pytest.raises(LayoutError, match=r"Layout\('row', 'depth'\): no axis 'depth' on this grid; it has row, col"):
        Layout("row", "depth").on({"row": 2, "col": 2}, 2)
    with pytest.raises(LayoutError, match="no axis 'depth' on this grid"):
        Layout(None, partial=("depth",)).on({"row": 2, "col": 2}, 1)


def test_a_wrong_number_of_dims_is_an_error():
    with pytest.raises(LayoutError, match=r"Layout\('row', None\): 2 dims for an array of 3; give one entry per dim"):
        Layout("row", None).on({"row": 2}, 3)


def test_axes_of_size_one_drop_out_before_layouts_compare():
    sizes = {"data": 1, "row": 2, "col": 1}
    long = Layout(("data", "row"), "col", partial=()).on(sizes, 2)
    assert long == Layout("row", None)
    assert hash(long) == hash(Layout("row", None))
    assert Layout("row", None, partial=("data",)).on(sizes, 2) == Layout("row", None)


def test_equal_layouts_have_equal_hashes_whatever_the_spelling():
    spellings = {Layout("row", None), Layout(("row",), ()), Layout(["row"], [])}
    assert spellings == {Layout("row", None)}
    assert Layout(None, partial=("a", "b")) == Layout(None, partial=("b", "a")) != Layout(None, partial="a")


@pytest.mark.parametrize("layout", layouts(2, ["row", "col"]), ids=repr)
def test_repr_says_how_to_make_it(layout):
    assert eval(repr(layout), {"Layout": Layout}) == layout


def test_with_partial_keeps_the_cut():
    assert Layout("row", None).with_partial("b", "a") == Layout("row", None, partial=("a", "b"))
    assert Layout("row", None, partial="a").with_partial() == Layout("row", None)
