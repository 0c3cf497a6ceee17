"""Every named algorithm gives the product, moves the words of its formula, and never makes a matrix whole."""

import math

import numpy as np
import pytest

from colossal_mpi import GridError, Layout, ShapeError, distarray, from_global, ledger, zeros
from colossal_mpi.linalg import ALGORITHMS, adjoints, contract, matmul, preset
from tests.cases import inner, integers, refusal, represents, totals

GRIDS = [
    {"row": 1, "col": 1},
    {"col": 2},
    {"col": 3},
    {"row": 1, "col": 3},
    {"row": 2, "col": 2},
    {"row": 2, "depth": 2},
    {"row": 2, "col": 3},
    {"row": 1, "col": 3, "depth": 2},
    {"row": 2, "col": 2, "depth": 2},
]
SIZES = [(7, 5, 9), (1, 5, 2), (8, 8, 8), (3, 11, 1), (4, 0, 5)]
NAMES = list(ALGORITHMS)

on_every_grid = pytest.mark.grids(*GRIDS)
on_every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def fitting(grid):
    return [name for name in NAMES if ALGORITHMS[name].fits(grid)]


def operands(grid, name, size, dtype="float64"):
    """Return the algorithm, and the global matrices and their distributed forms as it stores them."""
    m, k, n = size
    choice = preset(name, grid)
    a, b = integers((m, k), dtype, 1), integers((k, n), dtype, 2)
    return choice, a, b, from_global(a, grid, choice.a), from_global(b, grid, choice.b)


def extents(choice, grid):
    """Return the numbers of parts into which the algorithm cuts m, k and n."""
    return [grid.extent([axis for axis, letter in choice.axes.items() if letter == x]) for x in "mkn"]


def volume(choice, grid, size):
    """Return the words that all ranks together receive: every array once to each rank that lacks it."""
    m, k, n = size
    p_m, p_k, p_n = extents(choice, grid)
    return m * k * (p_n - 1) + k * n * (p_m - 1) + m * n * (p_k - 1)


def words(grid, call):
    """Return the result of a call and the words that all ranks together received in it."""
    with ledger.record() as moved:
        result = call()
    return result, totals([moved.words], grid)[0]


@on_every_grid
@on_every_size
def test_every_algorithm_gives_the_product_and_moves_the_words_of_its_formula(grid, size):
    for name in fitting(grid):
        choice, a, b, A, B = operands(grid, name, size)
        C, received = words(grid, lambda A=A, B=B, name=name: matmul(A, B, name))
        assert represents(C, a @ b), name
        assert C.layout == choice.c.on(grid.axes, 2), name
        assert received == volume(choice, grid, size), name


@on_every_grid
@on_every_size
def test_both_adjoints_of_every_algorithm_move_the_words_of_the_same_formula(grid, size):
    first, second = adjoints("mk,kn->mn")
    for name in fitting(grid):
        choice, a, b, A, B = operands(grid, name, size)
        dc = integers((size[0], size[2]), seed=3)
        dC = from_global(dc, grid, choice.c)
        dA, for_a = words(grid, lambda B=B, dC=dC, choice=choice: contract(first, dC, B, choice.axes, choice.a))
        dB, for_b = words(grid, lambda A=A, dC=dC, choice=choice: contract(second, A, dC, choice.axes, choice.b))
        assert represents(dA, dc @ b.T), name
        assert represents(dB, a.T @ dc), name
        assert for_a == for_b == volume(choice, grid, size), name
        sums = totals([inner(matmul(A, B, name), dC), inner(A, dA), inner(B, dB)], grid)
        assert len(set(sums)) == 1, name


@on_every_grid
def test_every_algorithm_stores_each_word_once(grid):
    for name in fitting(grid):
        choice = preset(name, grid)
        for layout in (choice.a, choice.b, choice.c):
            cut = layout.on(grid.axes, 2).cut
            assert set(cut) == {axis for axis, n in grid.axes.items() if n > 1}, (name, layout)


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 3}, {"row": 2, "col": 2, "depth": 2})
def test_no_matrix_is_ever_whole_on_a_rank(grid, monkeypatch):
    sizes = []

    def watched(block, shape, *rest):
        moved = redistribute(block, shape, *rest)
        sizes.append((moved.size, math.prod(shape)))
        return moved

    redistribute = distarray.redistribute
    monkeypatch.setattr(distarray, "redistribute", watched)
    fitting = [name for name in ("summa", "2.5d", "3d") if ALGORITHMS[name].fits(grid)]
    for name in fitting:
        choice, _, _, A, B = operands(grid, name, (7, 5, 9))
        C = matmul(A, B, name)
        contract("mn,kn->mk", C, B, choice.axes, choice.a)
        contract("mk,mn->kn", A, C, choice.axes, choice.b)
    assert len(sizes) >= 2 * len(fitting) > 0
    assert all(held < whole for held, whole in sizes)


@pytest.mark.grids({"col": 3})
def test_1d_row_gathers_nothing(grid):
    _, _, _, A, B = operands(grid, "1d-row", (7, 5, 9))
    with ledger.record() as moved:
        matmul(A, B, "1d-row")
    assert [event.op for event in moved.events] == ["reduce_scatter"]


@pytest.mark.grids({"row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2})
def test_operands_may_lie_anywhere(grid):
    a, b = integers((7, 5), seed=1), integers((5, 9), seed=2)
    last = list(grid.axes)[-1]
    anywhere = [
        Layout(None, None),
        Layout(last, None),
        Layout(None, tuple(grid.axes)),
        Layout(None, last, partial="row"),
    ]
    for name in fitting(grid):
        for one, other in zip(anywhere, reversed(anywhere), strict=True):
            C = matmul(from_global(a, grid, one), from_global(b, grid, other), name, out=one)
            assert C.layout == one
            assert represents(C, a @ b), (name, one, other)


@pytest.mark.grids({"col": 2}, {"row": 2, "col": 2}, {"row": 2, "col": 2, "depth": 2})
def test_the_default_is_the_first_algorithm_that_uses_all_axes(grid):
    name = {1: "1d-column", 2: "summa", 3: "2.5d"}[len(grid.axes)]
    choice, _, _, A, B = operands(grid, name, (7, 5, 9))
    C, received = words(grid, lambda: A @ B)
    assert fitting(grid)[0] == name
    assert C.layout == choice.c
    assert received == volume(choice, grid, (7, 5, 9))


@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128", "int64"])
def test_every_dtype_is_kept(grid, dtype):
    _, a, b, A, B = operands(grid, "summa", (7, 5, 9), dtype)
    C = matmul(A, B)
    assert C.dtype == np.dtype(dtype)
    assert represents(C, a @ b)


WRONG = {
    "unknown": ("cannon", "no algorithm 'cannon'; there are 1d-column, 1d-row, summa, summa-a, summa-b, 2.5d, 3d"),
    "1d-column": (
        "1d-column",
        "uses the axes col and not all of Grid(row=2, col=2); on this grid use summa, summa-a, summa-b, 2.5d, 3d",
    ),
    "1d-row": (
        "1d-row",
        "uses the axes col and not all of Grid(row=2, col=2); on this grid use summa, summa-a, summa-b, 2.5d, 3d",
    ),
}


@pytest.mark.grids({"row": 2, "col": 2})
@pytest.mark.parametrize(("name", "message"), WRONG.values(), ids=WRONG)
def test_an_algorithm_that_does_not_fit_is_an_error_on_all_ranks(grid, name, message):
    A = zeros((7, 7), grid, Layout("row", "col"))
    kind, text = refusal(lambda: matmul(A, A, name), grid)
    assert kind is GridError
    assert f"{name!r}" in text
    assert message in text


@pytest.mark.grids({"data": 2, "seq": 2})
def test_a_grid_of_other_axes_needs_a_map(grid):
    A = zeros((7, 7), grid, Layout("data", "seq"))
    kind, text = refusal(lambda: A @ A, grid)
    assert kind is GridError
    assert "or call contract with a map" in text


@pytest.mark.grids({"row": 2, "col": 2})
def test_shapes_that_do_not_fit_are_errors_on_all_ranks(grid):
    A, B, v = (zeros(shape, grid, Layout(*[None] * len(shape))) for shape in ((7, 5), (6, 9), (5,)))
    (one, of_k), (other, of_dims) = refusal(lambda: matmul(A, B), grid), refusal(lambda: A @ v, grid)
    assert one is other is ShapeError
    assert "k of a (5) and k of b (6) must be equal, on Grid(row=2, col=2)" in of_k
    assert "matmul of shapes (7, 5) and (5,): both must have 2 dims" in of_dims


@pytest.mark.grids({"col": 2})
@pytest.mark.parametrize("other", [2.0, [[1.0]], np.ones((5, 9))], ids=lambda x: type(x).__name__)
def test_matmul_with_what_is_no_distributed_array_is_a_type_error(grid, other):
    A = zeros((7, 5), grid, Layout("col", None))
    with pytest.raises(TypeError):
        A @ other
    with pytest.raises(TypeError):
        other @ A
