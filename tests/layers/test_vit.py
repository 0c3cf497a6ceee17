"""Loss, logits and every gradient of a ragged ViT equal PyTorch's in every mode; images of another size are refused."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, OptionError, ShapeError, distarray
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.models import ViT, ViTConfig
from tests.reference import vit_case as case
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import every_mode, parallelism


@pytest.mark.prepare(case.prepare)
@every_mode
def test_vit_equals_pytorch(grid, prepared):
    for name in case.CASES:
        exact = dict(np.load(prepared / f"{name}.npz"))
        loss, results, _ = case.run(name, parallelism(grid))
        reference = float(exact.pop("loss"))
        assert abs(loss - reference) <= 1e-12 * reference
        assert set(results) == set(exact)
        assert difference({key: block_and_index(array) for key, array in results.items()}, exact) <= 1e-10
        assert min(abs(whole).max() for whole in exact.values()) > 0


@pytest.mark.grids({"row": 2, "col": 3}, {"row": 2, "col": 2, "depth": 2})
def test_blocks_of_a_tiny_vit_may_be_empty(grid, monkeypatch):
    tiny = ViTConfig(**case.SIZES | {"hidden": 1, "heads": 1, "inner": 1, "classes": 7, "layers": 1})
    monkeypatch.setitem(case.CASES, "tiny", tiny)
    loss, results, _ = case.run("tiny", parallelism(grid))
    reference, exact, _ = case.run("tiny", Parallelism(Grid(MPI.COMM_SELF)))
    assert abs(loss - reference) <= 1e-12 * reference
    whole = {name: array.gather() for name, array in exact.items()}
    assert difference({name: block_and_index(array) for name, array in results.items()}, whole) <= 1e-10


def test_sizes_that_do_not_fit_are_refused():
    p = Parallelism(Grid(MPI.COMM_SELF))
    with pytest.raises(OptionError, match="images 8 and patches 9: at least one patch must fit in"):
        ViT(ViTConfig(image=8, patch=9), p)
    with pytest.raises(OptionError, match="pool='last': use 'first' or 'mean'"):
        ViT(ViTConfig(image=8, patch=4, layers=1, hidden=4, heads=1, pool="last"), p)
    model = ViT(case.CASES["first"], p)
    for shape in ((2, 3, 8, 7), (2, 1, 9, 7), (2, 9, 7)):
        with pytest.raises(ShapeError, match=r"a ViT of images \[b, 3, 9, 7\]"):
            model.forward(distarray.zeros(shape, p.grid, Layout(*[None] * len(shape))), Context())
