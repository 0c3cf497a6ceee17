"""Models cut along the sequence, as a ring, by heads or both, in every mode, equal one rank's."""

import numpy as np
import pytest
from reference import sequence_case as case
from reference.gpt_case import block_and_index, difference

prepared_by = pytest.mark.prepare(case.prepare)
GRIDS = (
    {"seq": 2},
    {"seq": 3},
    {"seq": 4},
    {"ulysses": 3},
    {"seq": 2, "ulysses": 2},
    {"seq": 2, "col": 2},
    {"seq": 3, "col": 2},
    {"ulysses": 2, "col": 2},
    {"seq": 2, "row": 1, "col": 2},
    {"seq": 2, "row": 2},
    {"ulysses": 2, "row": 2},
    {"seq": 2, "depth": 2, "row": 1, "col": 2},
    {"ulysses": 2, "depth": 2, "col": 2},
    {"seq": 2, "col": 2, "depth": 2},
    {"ulysses": 2, "row": 2, "depth": 2},
    {"data": 2, "seq": 2},
    {"data": 2, "seq": 2, "ulysses": 2},
    {"seq": 2, "ulysses": 2, "col": 2},
    {"data": 2, "seq": 2, "col": 2},
)
every_grid = pytest.mark.grids(*GRIDS)


def check(prepared, name, p, **options):
    exact = dict(np.load(prepared / f"{name}.npz"))
    loss, gradients = case.run(name, p, **options)
    reference = float(exact.pop("loss"))
    assert abs(loss - reference) <= 1e-12 * reference, name
    assert set(gradients) == set(exact)
    assert difference({key: block_and_index(g) for key, g in gradients.items()}, exact) <= 1e-10, name


@prepared_by
@every_grid
def test_every_model_equals_one_rank(grid, prepared):
    for name in case.MODELS:
        check(prepared, name, case.parallelism(grid))
