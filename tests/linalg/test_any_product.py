"""Generated products: any subscripts, sizes, layouts and map give the product of NumPy, with the words foretold."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from colossal_mpi import comm, from_global, ledger, linalg
from colossal_mpi.linalg.contraction.subscripts import parse
from colossal_mpi.linalg.model.auto import maps
from tests.cases import represents
from tests.generated import agreed, examples, layouts_of, values


@st.composite
def subscripts(draw):
    """Return a strategy for products with letters of all kinds: of both operands and the result, of two of them."""
    kinds = {"batch": "xy", "rows": "mi", "columns": "nj", "inner": "kl"}
    found = {kind: letters[: draw(st.integers(0, 2))] for kind, letters in kinds.items()}
    assume(found["batch"] + found["rows"] + found["inner"])
    assume(found["batch"] + found["columns"] + found["inner"])
    a = "".join(draw(st.permutations(found["batch"] + found["rows"] + found["inner"])))
    b = "".join(draw(st.permutations(found["batch"] + found["inner"] + found["columns"])))
    c = "".join(draw(st.permutations(found["batch"] + found["rows"] + found["columns"])))
    return f"{a},{b}->{c}"


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 1, "col": 3})
@examples()
@given(st.data())
def test_any_product_is_that_of_numpy(grid, data):
    text = data.draw(subscripts())
    sub = parse(text)
    sizes = {letter: data.draw(st.integers(0, 5)) for letter in sorted({*sub.a, *sub.b})}
    a, b = values([sizes[x] for x in sub.a], "float64"), values([sizes[x] for x in sub.b], "float64", 1)
    A, B = (from_global(x, grid, data.draw(layouts_of(x.ndim, list(grid.axes), partial=False))) for x in (a, b))
    out = data.draw(layouts_of(len(sub.c), list(grid.axes), partial=False))
    axes = data.draw(st.sampled_from(list(maps(sub, grid))))
    with ledger.record() as moved:
        c = linalg.contract(text, A, B, axes, out)
    foretold = linalg.price(text, sizes, grid.axes, axes, A.layout, B.layout, out).words
    assert agreed(grid, represents(c, np.einsum(text, a, b)), tuple(comm.collect(moved.words, grid)) == tuple(foretold))
