"""Mixtures of experts equal PyTorch's loop over the experts in every mode, and move the words of their formulas."""

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import DTypeError, Grid, Layout, OptionError, ShapeError, comm, from_global, ledger, random
from colossal_mpi.layers import AuxiliaryLosses, Context, Parallelism, backpropagate
from colossal_mpi.layers.block import TransformerBlock
from colossal_mpi.layers.loss import MeanSquaredError
from colossal_mpi.layers.moe import BALANCE_OVER, MoE
from colossal_mpi.layers.optim import AdamW
from tests.cases import host, indices
from tests.layers.test_finite_differences import slope
from tests.reference import moe_case as case
from tests.reference.gpt_case import block_and_index, difference
from tests.reference.modes import every_cut, few, mode_of, parallelism
from tests.reference.saboteur import Saboteur
from tests.reference.words import moe_words

prepared_by = pytest.mark.prepare(case.prepare)
more_ranks_than_experts = pytest.mark.grids({"data": 4}, {"data": 3, "depth": 2}, {"data": 6})


def check(grid, prepared, name, p=None):
    exact = dict(np.load(prepared / f"{name}.npz"))
    results, losses, _ = case.run(grid, p or parallelism(grid), name)
    reference = {key.removeprefix("loss/"): exact.pop(key) for key in list(exact) if key.startswith("loss/")}
    assert set(results) == set(exact)
    assert set(losses) == set(reference)
    assert difference({key: block_and_index(a) for key, a in results.items()}, exact) <= 1e-10, name
    assert all(abs(losses[key] - reference[key]) <= 1e-12 * reference[key] for key in losses)
    assert min(abs(whole).max() for whole in exact.values()) > 1e-3  # no gradient passes by being zero


@prepared_by
@every_cut
def test_mixture_equals_pytorch(grid, prepared):
    for name in case.CASES:
        check(grid, prepared, name)


@prepared_by
@more_ranks_than_experts
def test_mixture_on_more_ranks_than_experts_equals_pytorch(grid, prepared):
    mode = "3d" if "depth" in grid.axes else None
    for name in case.CASES:
        check(grid, prepared, name, Parallelism(grid, mode))
        check(grid, prepared, name, Parallelism(grid, mode, keep_gathered=False))


@prepared_by
@every_cut
def test_microbatches_change_no_gradient(grid, prepared):
    """The sequences have different numbers of tokens, and one has none."""
    exact = dict(np.load(prepared / "masked.npz"))
    gradients, losses = case.run_in_microbatches(grid, parallelism(grid), "masked", 3)
    wanted = {name: exact[name] for name in gradients}
    assert difference({name: block_and_index(a) for name, a in gradients.items()}, wanted) <= 1e-10
    assert losses == pytest.approx({name: float(exact[f"loss/{name}"]) for name in losses}, rel=1e-12)


def test_a_balance_over_the_microbatch_depends_on_its_size():
    grid = Grid(MPI.COMM_SELF)
    (_, whole), (_, cut) = (case.run_in_microbatches(grid, Parallelism(grid), "microbatch", n) for n in (1, 3))
    assert abs(cut["moe.balance"] - whole["moe.balance"]) > 1e-3 * whole["moe.balance"]
    assert cut["moe.z_loss"] == pytest.approx(whole["moe.z_loss"], rel=1e-12)


@few
@pytest.mark.parametrize("name", case.MASKED)
def test_losses_have_their_gradients(grid, name):
    p = parallelism(grid)
    layer, ctx = case.make(p, name), case.context(grid, p, name)
    x, dy = (from_global(a, grid, p.stream()) for a in (case.X, case.DY))

    def value():
        return (layer.forward(x, ctx)[0] * dy).sum() + sum(ctx.auxiliary.values.values())

    dx = layer.backward(dy, layer.forward(x, ctx)[1])
    tensors = {"x": (x, dx)} | {q.name: (q.value, q.reduce()) for q in layer.parameters()}
    for label, (array, gradient) in tensors.items():
        v = random.normal(array.shape, grid, array.layout, 5, label)
        assert abs((gradient * v).sum() - slope(value, array, v)) <= 1e-9 * gradient.norm() * v.norm(), label


def slots_of(grid, layer, whole, router):
    """Return the slots of each expert in a block: the most assignments, rounded up by an eighth at most."""
    chosen = np.argsort(-(whole @ router), axis=-1, kind="stable")[..., : layer.top_k]
    most = 0
    for rank in range(grid.size):
        rows, columns = indices(chosen.shape[:2], Layout(*layer.stream.dims[:2]), grid.axes, grid.coords_of(rank))
        most = max(most, *np.bincount(chosen[np.ix_(rows, columns)].reshape(-1), minlength=router.shape[1]))
    return next(n for n in range(most, 2 * most + 1) if n < 16 or n % 2 == 0)


@every_cut
@pytest.mark.parametrize("over", BALANCE_OVER)
def test_words_equal_their_closed_form(grid, over):
    p, sizes = parallelism(grid), {"b": case.B, "s": case.S, "h": case.H, "f": case.F, "experts": 5, "top_k": 2}
    layer = MoE(case.H, case.F, 5, p, "moe", balance=1.0, balance_over=over, std=0.5, dtype="float64")
    x = from_global(case.X, grid, p.stream())
    with ledger.record() as moved:
        y, cache = layer.forward(x, Context(auxiliary=AuxiliaryLosses(values={})))
        layer.backward(y, cache)
    left = {axis for q in layer.experts.parameters() for axis in q.grad.layout.partial}
    assert left <= {"seq", "ulysses"}  # nothing is left to reduce over data
    slots = slots_of(grid, layer, case.X, layer.router.weight.value.gather())
    template = "B" if mode_of(grid) in ("2d", "2.5d") else "A"
    words = moe_words(template, grid.axes, **sizes, slots=slots, pairs=2, balance_over=over)
    assert sum(comm.collect(moved.words, grid)) == words


@pytest.mark.grids(
    {"data": 2, "col": 2}, {"row": 2, "col": 2}, {"depth": 2, "row": 2}, {"row": 2, "depth": 2}, {"data": 2, "depth": 2}
)
def test_each_reduction_is_missed(grid, monkeypatch):
    """All experts take all tokens, so that a reduction that is left out changes no shape."""
    saboteur = Saboteur(monkeypatch)

    def results(grid, p, victim=None):
        layer = MoE(case.H, case.F, 3, p, "moe", top_k=3, balance=1.0, z_loss=1.0, bias=True, std=0.5, dtype="float64")
        x, dy = (from_global(a, grid, p.stream()) for a in (case.X, case.DY))
        saboteur.arm(victim)
        y, cache = layer.forward(x, Context())
        arrays = {"y": y, "dx": layer.backward(dy, cache), **{q.name: q.reduce() for q in layer.parameters()}}
        saboteur.armed = False
        return {name: a.gather() for name, a in arrays.items()}

    one = Grid(MPI.COMM_SELF)
    exact = results(one, Parallelism(one))

    def seen(victim=None):
        mine = {name: (a, ...) for name, a in results(grid, parallelism(grid), victim).items()}
        return max(comm.collect(difference(mine, exact), grid))

    assert seen() <= 1e-10
    reductions = saboteur.log
    assert {axis for _, axes in reductions for axis in axes} == set(grid.axes)
    for victim, reduction in enumerate(reductions):
        assert seen(victim) > 1e-10, f"reduction {victim}, {reduction}, is not missed"


@few
def test_equal_logits_go_to_the_lower_experts(grid):
    p = parallelism(grid)
    layer = MoE(case.H, case.F, 5, p, "moe", std=0.5, dtype="float64")
    layer.router.weight.value *= 0
    chosen = layer.forward(from_global(case.X, grid, p.stream()), Context())[1][3].chosen
    assert np.all(host(chosen) == [0, 1])


@few
def test_a_sequence_of_no_tokens_passes(grid):
    p = parallelism(grid)
    layer = MoE(case.H, case.F, 5, p, "moe", balance=1.0, z_loss=1.0, bias=True, dtype="float64")
    y, cache = layer.forward(from_global(case.X[:, :0], grid, p.stream()), Context())
    dx = layer.backward(y, cache)
    assert y.shape == dx.shape == (case.B, 0, case.H)
    assert all(q.reduce().norm() == 0 for q in layer.parameters())


@few
def test_a_block_of_experts_trains(grid):
    def losses(grid, p):
        experts = {"experts": 5, "balance": 0.01, "z_loss": 1e-3}
        options = {"norm": "rms", "activation": "swiglu", "bias": False, "std": 0.3, "dtype": "float64"}
        model = TransformerBlock(case.H, 3, case.F, p, "block", experts=experts, **options)
        optimizer, loss = AdamW(model.parameters(), lr=0.1), MeanSquaredError()
        x, target = (from_global(a, grid, p.stream()) for a in (case.X, np.tanh(case.X[..., ::-1])))
        for _ in range(8):
            ctx = Context(auxiliary=AuxiliaryLosses(values={}))
            yield backpropagate(model, loss, x, target, ctx)
            assert set(ctx.auxiliary.values) == {"block.mlp.balance", "block.mlp.z_loss"}
            optimizer.step()

    one = Grid(MPI.COMM_SELF)
    mine, reference = (np.array(list(losses(g, p))) for g, p in ((grid, parallelism(grid)), (one, Parallelism(one))))
    assert np.max(abs(mine - reference) / reference) <= 1e-9
    assert mine[-1] < 0.5 * mine[0]


def test_options_that_do_not_fit_are_refused():
    p = Parallelism(Grid(MPI.COMM_SELF))
    for options in ({"top_k": 4}, {"top_k": 0}, {"balance": -1.0}, {"z_loss": -1.0}):
        with pytest.raises(OptionError, match="top_k must be from 1 to the number of experts"):
            MoE(4, 4, 3, p, "moe", **options)
    with pytest.raises(OptionError, match="balance_over='step' must be one of sequence, microbatch"):
        MoE(4, 4, 3, p, "moe", balance_over="step")


@few
def test_masks_that_do_not_fit_are_refused(grid):
    p, tokens = parallelism(grid), parallelism(grid).tokens()
    layer, x = MoE(4, 4, 3, p, "moe", balance=1.0), random.normal((2, 3, 4), grid, p.stream(), 0, "x").astype("float32")
    with pytest.raises(ShapeError, match=r"mask must be of shape \[b, s\] = \[2, 3\], as its input; it is \[3, 2\]"):
        layer.forward(x, Context(mask=from_global(np.ones((3, 2), bool), grid, tokens)))
    with pytest.raises(DTypeError, match="mask must be bool"):
        layer.forward(x, Context(mask=from_global(np.ones((2, 3)), grid, tokens)))
