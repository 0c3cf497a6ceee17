"""Models whose sequence is cut, by a ring, by heads or by both, have the loss and the gradients of one rank."""

import numpy as np
import pytest

from tests.reference import sequence_case as case
from tests.reference.gpt_case import block_and_index, difference

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
)
RNG = np.random.default_rng(5)


def off(prepared, name, p, **options):
    """Return the difference of loss and gradients from one rank's, divided by the tolerance."""
    exact = dict(np.load(prepared / f"{name}.npz"))
    loss, gradients = case.run(name, p, **options)
    reference = float(exact.pop("loss"))
    assert set(gradients) == set(exact)
    found = difference({key: block_and_index(g) for key, g in gradients.items()}, exact)
    return max(abs(loss - reference) / reference / 1e-12, found / 1e-10)


@prepared_by
@pytest.mark.grids(*GRIDS)
def test_every_model_equals_one_rank(grid, prepared):
    p = case.parallelism(grid)
    assert not {name: x for name in case.MODELS if not (x := off(prepared, name, p)) <= 1}


@prepared_by
@pytest.mark.grids({}, {"seq": 2}, {"seq": 4}, {"seq": 2, "ulysses": 2, "col": 2}, {"seq": 8})
def test_order_changes_nothing(grid, prepared):
    """The order is the one that balances a ring, or a random one; on 8 ranks blocks have one or two tokens."""
    p = case.parallelism(grid)
    balanced = p.order(case.S, case.DOCUMENTS)
    for order in (p.order(case.S), balanced, np.random.default_rng(6).permutation(case.S)):
        assert not {name: x for name in case.ORDERED if not (x := off(prepared, name, p, order=order)) <= 1}


@prepared_by
@pytest.mark.grids({"seq": 3}, {"seq": 2, "col": 2}, {"seq": 2, "ulysses": 2})
def test_heads_may_be_cut_instead_of_a_ring(grid, prepared):
    p = case.parallelism(grid, sequence="ulysses")
    assert not p.ring
    assert p.order(case.S) is None
    assert not {name: x for name in case.MODELS if not (x := off(prepared, name, p)) <= 1}


@prepared_by
@pytest.mark.parametrize(("zero", "keep"), [(0, False), (1, True), (2, True), (3, False)])
@pytest.mark.grids({"seq": 3}, {"data": 2, "seq": 2, "ulysses": 2}, {"seq": 2, "row": 2})
def test_zero_and_microbatches_and_stored_operands(grid, prepared, zero, keep):
    p = case.parallelism(grid, zero=zero, keep_gathered=keep)
    for name in ("gpt", "llama", "bert", "experts"):
        assert off(prepared, name, p, order=p.order(case.S), microbatches=3) <= 1, name
