"""Generated arrays: any shape in any layout is moved, indexed, saved and loaded as NumPy would have it."""

import itertools
import math
import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_mpi import checkpoint, comm, from_global, ledger, linalg, zeros
from colossal_mpi.layout import box_shape, coords_of, rank_of
from colossal_mpi.redistribution import received
from tests.cases import host, indices, represents, spread
from tests.generated import DTYPES, agreed, examples, indices_of, layouts_of, shapes, values

on_grids = pytest.mark.grids({"row": 2, "col": 2}, {"row": 1, "col": 3}, {"row": 2, "col": 3})


@examples(10)
@given(st.data())
def test_blocks_tile_any_array(data):
    sizes = dict(zip("abc", data.draw(st.lists(st.integers(1, 5), max_size=3)), strict=False))
    shape = data.draw(shapes())
    layout = data.draw(layouts_of(len(shape), list(sizes)))
    hits = np.zeros(shape, int)
    for at in itertools.product(*map(range, sizes.values())):
        coords = dict(zip(sizes, at, strict=True))
        assert coords_of(rank_of(coords, sizes), sizes) == coords
        box = layout.box(shape, sizes, coords)
        assert [list(range(*extent)) for extent in box] == [
            list(held) for held in indices(shape, layout, sizes, coords)
        ]
        assert math.prod(box_shape(box)) <= math.prod(
            -(-n // math.prod(sizes[axis] for axis in axes)) for n, axes in zip(shape, layout.dims, strict=True)
        )
        hits[tuple(itertools.starmap(slice, box))] += 1
    assert (hits == math.prod(n for axis, n in sizes.items() if axis not in layout.cut)).all()


@on_grids
@examples()
@given(st.data())
def test_any_move_keeps_the_array_and_its_words_are_foretold(grid, data):
    shape, dtype = data.draw(shapes()), data.draw(DTYPES)
    source, target = (data.draw(layouts_of(len(shape), list(grid.axes))) for _ in range(2))
    whole = values(shape, dtype)
    x = spread(whole, grid, source)
    with ledger.record() as moved:
        y = x.redistribute(target)
    foretold = received(shape, x.layout, y.layout, grid.axes)[grid.rank]
    assert agreed(grid, moved.words == foretold, represents(y, whole), represents(x, whole), y.dtype == x.dtype)


@on_grids
@examples()
@given(st.data())
def test_any_index_gives_what_numpy_gives(grid, data):
    shape, dtype = data.draw(shapes()), data.draw(DTYPES)
    layout, index = data.draw(layouts_of(len(shape), list(grid.axes))), data.draw(indices_of(shape))
    whole = values(shape, dtype)
    assert agreed(grid, represents(spread(whole, grid, layout)[index], np.asarray(whole[index])))


@on_grids
@examples(0.5)
@given(st.data())
def test_operators_take_any_two_layouts(grid, data):
    """What the sum of two arrays needs is moved, or one error says on all ranks why it cannot be formed."""
    shape = data.draw(shapes(most=2))
    layout = data.draw(layouts_of(len(shape), list(grid.axes)))
    operation = data.draw(st.sampled_from([operator.add, operator.sub]))
    a, b = values(shape, "float64"), values(shape, "float64", seed=1)
    found = operation(spread(a, grid, layout), spread(b, grid, layout, seed=5))
    assert agreed(grid, represents(found, operation(a, b)))


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 1, "col": 3})
@examples(0.3)
@given(st.data())
def test_any_checkpoint_loads_in_any_layout(grid, shared_path, data):
    shapes_here = data.draw(st.dictionaries(st.sampled_from(["a", "b/c", "d.e"]), shapes(), max_size=3))
    wholes = {name: values(shape, data.draw(DTYPES), i) for i, (name, shape) in enumerate(shapes_here.items())}
    draw_layout = {name: layouts_of(whole.ndim, list(grid.axes), partial=False) for name, whole in wholes.items()}
    saved = {name: from_global(whole, grid, data.draw(draw_layout[name])) for name, whole in wholes.items()}
    loaded = {n: zeros(w.shape, grid, data.draw(draw_layout[n]), dtype=w.dtype) for n, w in wholes.items()}
    path = shared_path / f"{len(list(shared_path.iterdir()))}"
    comm.collect(None, grid)
    checkpoint.save(path, saved, {"step": 1}, grid)
    assert checkpoint.load(path, loaded, grid) == {"step": 1}
    assert agreed(grid, *(represents(loaded[name], whole) for name, whole in wholes.items()))


@pytest.mark.grids({"row": 2, "col": 2})
@examples(0.3)
@given(st.data())
def test_any_array_goes_through_a_file(grid, shared_path, data):
    shape, dtype = data.draw(shapes()), data.draw(DTYPES)
    source, target = (data.draw(layouts_of(len(shape), list(grid.axes), partial=False)) for _ in range(2))
    whole, path = values(shape, dtype), shared_path / "a.h5"
    linalg.save(path, "x", from_global(whole, grid, source), overwrite=True)
    loaded = linalg.load(path, "x", grid, target)
    assert agreed(grid, represents(loaded, whole), host(loaded).dtype == whole.dtype)
