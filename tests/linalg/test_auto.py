"""The chosen map is the cheapest from where the operands lie; explain shows prediction and measurement."""

import numpy as np
import pytest

from colossal_mpi import Layout, ShapeError, comm, from_global, ledger, linalg
from colossal_mpi.linalg.contraction.subscripts import parse
from colossal_mpi.linalg.model.auto import maps, options
from colossal_mpi.machine import measure
from tests.cases import integers

GRIDS = pytest.mark.grids({}, {"row": 2, "col": 2}, {"row": 3, "col": 2}, {"x": 2, "y": 2, "z": 2})


def operands(grid, m, n, k, a=None, b=None):
    layout = Layout(grid.axes, None)
    whole = integers((m, k)), integers((k, n), seed=1)
    return whole, [from_global(w, grid, lay or layout) for w, lay in zip(whole, (a, b), strict=True)]


@GRIDS
@pytest.mark.parametrize("sizes", [(7, 5, 9), (1, 33, 4), (40, 3, 2), (3, 3, 60)], ids=str)
def test_auto_is_exact_and_moves_what_was_predicted(grid, sizes):
    (x, y), (a, b) = operands(grid, *sizes)
    best = options("mk,kn->mn", a, b)[0]
    with ledger.record() as moved:
        c = linalg.matmul(a, b, "auto")
    assert np.array_equal(c.gather(), x @ y)
    assert comm.collect(moved.words, grid) == list(best.price.words)
    assert c.layout == best.out.on(grid.axes, 2)


@pytest.mark.grids({"row": 2, "col": 2})
def test_no_other_map_is_modelled_faster(grid):
    _, (a, b) = operands(grid, 64, 48, 80)
    ranked = options("mk,kn->mn", a, b)
    assert len(ranked) == len(list(maps(parse("mk,kn->mn"), grid))) == 16
    assert [option.seconds for option in ranked] == sorted(option.seconds for option in ranked)


@pytest.mark.grids({"row": 2, "col": 2})
def test_an_operand_in_place_stays_where_it_is(grid):
    _, (a, b) = operands(grid, 4000, 8, 8, Layout(("row", "col"), None), Layout(None, None))
    with ledger.record() as moved:
        linalg.matmul(a, b, "auto")
    assert sum(comm.collect(moved.words, grid)) == 0


@pytest.mark.grids({"row": 4})
def test_ties_go_against_cutting_k(grid):
    _, (a, b) = operands(grid, 64, 64, 64, Layout("row", None), Layout("row", None))
    k_cut = [option for option in options("mk,kn->mn", a, b) if option.axes == {"row": "k"}]
    assert options("mk,kn->mn", a, b)[0].axes != {"row": "k"}
    assert k_cut


@pytest.mark.grids({"row": 2, "col": 2})
def test_memory_decides_and_what_cannot_fit_is_refused(grid):
    _, (a, b) = operands(grid, 64, 64, 64)
    least = min(option.price.workspace for option in options("mk,kn->mn", a, b))
    assert all(option.price.workspace <= least for option in options("mk,kn->mn", a, b, memory=least))
    with pytest.raises(
        ShapeError, match=f"needs {least:,} elements of workspace on a rank, and memory is {least - 1:,}"
    ):
        options("mk,kn->mn", a, b, memory=least - 1)


@pytest.mark.grids({"row": 2, "col": 2})
def test_explain_shows_the_measured_words_beside_the_predicted(grid):
    _, (a, b) = operands(grid, 60, 40, 80)
    text = linalg.explain("mk,kn->mn", a, b, Layout("row", "col"), machine=measure(grid), most=3)
    head, columns, *lines = text.splitlines()
    assert "m=60 n=40 k=80 on Grid(row=2, col=2); lower bound" in head
    assert len(lines) == 3
    for line in lines:
        _, predicted, measured = line[:32], line[32:46].strip(), line[46:60].strip()
        assert predicted == measured
    assert max(len(line) for line in (columns, *lines)) <= 110
