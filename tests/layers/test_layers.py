"""Every layer of the table equals PyTorch's in every mode: output, cotangent of the input and each gradient."""

import numpy as np
import pytest
from reference import layer_case as case
from reference.gpt_case import block_and_index, difference
from reference.modes import every_mode, parallelism


@pytest.mark.prepare(case.prepare)
@every_mode
def test_layers_equal_torch(grid, prepared):
    p, wrong = parallelism(grid), {}
    for name in case.CASES:
        exact = dict(np.load(prepared / f"{name}.npz"))
        _, _, _, results = case.run(name, p)
        assert set(results) == set(exact), name
        assert min(abs(whole).max() for whole in exact.values()) > 1e-3, f"{name}: a result of zeros would pass"
        off = difference({key: block_and_index(array) for key, array in results.items()}, exact)
        wrong |= {name: off} if not off <= 1e-10 else {}
    assert not wrong
