"""A layer's module raises the same error on all ranks, whichever rank gives a wrong tensor."""

import numpy as np
import pytest

from colossal_mpi import DTypeError, Layout, LayoutError, OptionError, ShapeError, SharingError, comm
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.norm import LayerNorm
from tests.reference.modes import parallelism

torch = pytest.importorskip("torch")
from colossal_mpi.layers.torch import as_module  # noqa: E402

F64 = {"dtype": "float64"}
B, S, H = 5, 3, 7
FOUR = pytest.mark.grids({"row": 2, "col": 2})


@pytest.fixture(autouse=True)
def _host(grid):
    if grid.device != "cpu":
        pytest.skip("tensors of these tests are in host memory")


def random(*shape):
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape))


def linear(grid):
    return Linear("bsh,hf->bsf", {"h": H, "f": 9}, "f", parallelism(grid), "up", **F64)


WRONG = {
    "dtype": (
        lambda r: random(B, S, H).float(),
        DTypeError,
        r"needs torch\.float64 on every rank; rank 0 gives torch\.float32",
    ),
    "dtype of one": (lambda r: random(B, S, H).to([torch.float64, torch.float32][r == 2]), DTypeError, "rank 2 gives"),
    "array of one": (lambda r: random(B, S, H) if r else np.ones((B, S, H)), DTypeError, "rank 0 gives a ndarray"),
    "device of one": (
        lambda r: random(B, S, H).to(["cpu", "meta"][r == 3]),
        SharingError,
        "rank 3 gives a tensor on 'meta'",
    ),
    "shape of one": (
        lambda r: random(B + (r == 1), S, H),
        ShapeError,
        r"\(5, 3, 7\), \(6, 3, 7\), .* are not those of one",
    ),
    "dims of one": (lambda r: random(B, S, *[H] * (r != 3)), ShapeError, "are not those of one array"),
    "width": (lambda r: random(B, S, H + 1), ShapeError, r"h.*8.*7"),
}


@FOUR
@pytest.mark.parametrize(("make", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_one_rank_gives_wrong_is_told_to_all(grid, make, error, words):
    with pytest.raises(error, match=words) as caught:
        as_module(linear(grid))(make(grid.rank))
    assert len(set(comm.collect(str(caught.value), grid))) == 1


@FOUR
def test_layouts_and_names_that_do_not_fit_are_refused(grid):
    layer = linear(grid)
    with pytest.raises(LayoutError, match="torch cannot hold partial sums"):
        as_module(layer, y=Layout(None, None, None, partial="row"))
    with pytest.raises(LayoutError, match="no axis 'data'"):
        as_module(layer, x=Layout("data", None, None))
    with pytest.raises(ShapeError, match="not those of one array in"):
        as_module(layer, x=Layout("row", None, None))(random(1 + grid.coords["row"], S, H))
    with pytest.raises(ShapeError, match="give it on all ranks or on none"):
        as_module(layer)(random(B, S, H), mask=torch.ones(B, S, dtype=torch.bool) if grid.rank else None)
    taken = LayerNorm(H, parallelism(grid), "half", **F64)
    with pytest.raises(OptionError, match="'half.gain' cannot name a parameter of a module"):
        as_module(taken)
