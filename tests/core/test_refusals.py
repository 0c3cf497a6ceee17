"""Calls that would be silently wrong, or would leave ranks waiting, raise the same error on all ranks."""

import numpy as np
import pytest

from colossal_mpi import (
    ColossalError,
    DistArray,
    DTypeError,
    Grid,
    GridError,
    Layout,
    LayoutError,
    OptionError,
    ShapeError,
    comm,
    from_global,
    full,
    ledger,
    linalg,
)

two = pytest.mark.grids({"row": 2})


@two
def test_any_failure_of_one_rank_is_agreed_on(grid):
    values = {0: "here"}
    with pytest.raises(ColossalError, match="1"), comm.agreed(grid):
        values[grid.rank]
    assert comm.collect(grid.rank, grid) == [0, 1]


@two
def test_a_source_of_another_shape_is_refused(grid):
    with pytest.raises(ShapeError, match=r"shape=\(8,\) for a source of \(4,\)"):
        from_global(np.arange(4.0), grid, Layout("row"), shape=(8,))


@pytest.mark.grids({"row": 3})
def test_foreign_byte_order_is_made_native_or_refused(grid):
    assert np.array_equal(from_global(np.arange(3, dtype=">f8"), grid, Layout("row")).gather(), [0.0, 1.0, 2.0])
    foreign = DistArray(np.ones(3, ">f8"), (3,), Layout(None, partial="row"), grid)
    with pytest.raises(DTypeError, match="foreign byte order"):
        foreign.gather()


@pytest.mark.grids({"row": 2}, {"row": 3})
def test_sums_of_truth_values_and_maxima_of_complex_numbers_are_refused(grid):
    with pytest.raises(DTypeError, match="the sum of bool over ranks"):
        comm.allreduce(np.ones(3, bool), grid, ("row",))
    with pytest.raises(DTypeError, match="the max of complex128 over ranks"):
        comm.allreduce(np.ones(3, complex), grid, ("row",), comm.MAX)


@two
def test_partial_sums_do_not_become_integers(grid):
    halves = DistArray(np.full(4, 0.5), (4,), Layout(None, partial="row"), grid)
    with pytest.raises(LayoutError, match="not linear in partial sums"):
        halves.astype("int64")
    with pytest.raises(LayoutError, match="not linear in partial sums"):
        1.0 / halves


@two
def test_a_root_outside_the_grid_is_refused(grid):
    with pytest.raises(GridError, match=r"gather\(root=7\).*from 0 to 1"):
        full((4,), 1.0, grid, Layout("row")).gather(7)
    with pytest.raises(GridError, match="no axis 'foo'"):
        grid.at(foo=0)
    with pytest.raises(GridError, match=r"bcast\(root=2\).*from 0 to 1"):
        comm.bcast(grid.to_block([1.0]), grid, ("row",), root=2)
    with pytest.raises(GridError, match="no axis 'foo'"):
        comm.allreduce(grid.to_block([1.0]), grid, ("foo",))


@two
def test_an_unknown_reduction_is_refused(grid):
    with pytest.raises(OptionError, match="reduction 'min': use 'sum' or 'max'"):
        comm.allreduce(grid.to_block([1.0]), grid, ("row",), "min")


@two
def test_a_freed_grid_is_refused_and_may_be_freed_again(grid):
    with Grid(row=2) as freed:
        part = freed.at()
        arrays = [full((4,), 1.0, place, Layout("row")) for place in (freed, part)]
    for array in arrays:
        with pytest.raises(GridError, match=r"Grid\(row=2\) was freed"):
            array.replicated()
    freed.free()


@two
def test_a_distarray_is_no_numpy_array_and_the_reverse(grid):
    a = full((4, 4), 2.0, grid, Layout("row", None))
    with pytest.raises(TypeError, match="is no NumPy array"):
        np.asarray(a)
    with pytest.raises(DTypeError, match="operands are DistArray and ndarray"):
        linalg.contract("mk,kn->mn", a, np.ones((4, 4)), {"row": "m"})
    with pytest.raises(LayoutError, match="is mapped to 'mk'"):
        linalg.contract("mk,kn->mn", a, a, {"row": "mk"})


@two
def test_division_is_numpys_and_0d_results_can_be_written(grid):
    values = np.linspace(0.3, 7.0, 5)
    assert np.array_equal((3 / from_global(values, grid, Layout("row"))).gather(), 3 / values)
    scalar = full((), 3.0, grid, Layout()) * 2
    scalar.local[...] = 5
    assert scalar.sum() == 5


@two
def test_empty_nested_records_are_told_apart(grid):
    a = full((8,), 1.0, grid, Layout("row"))
    with ledger.record() as outer:
        with ledger.record() as inner:
            pass
        a.replicated()
    assert (outer.words, inner.words) == (4, 0)


@pytest.mark.grids({"row": 2, "col": 2})
def test_freed_grids_can_be_made_without_end(grid):
    for _ in range(800):  # three communicators each, and MPICH has 2048
        with Grid(row=2, col=2) as other:
            assert other.comm(("row",)).size == other.at(col=other.coords["col"]).size
