"""The reference kernels use only the array API standard and keep their digits, and each grid has its provider."""

import math
import sys
from types import ModuleType

import array_api_strict as strict
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, OptionError, from_global
from colossal_mpi.layers import Context, ReLU
from colossal_mpi.layers.kernels import provider
from colossal_mpi.layers.kernels import reference as kernels
from colossal_mpi.layers.kernels.reference import table as table_kernels
from colossal_mpi.layers.kernels.reference.normal import normal_cdf

RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal((2, 5, 3)), RNG.standard_normal((2, 5, 3))
HEADS = [RNG.standard_normal((2, 4, 3, 5)) for _ in range(5)]
STATISTICS = np.abs(RNG.standard_normal((2, 2, 3, 4, 1)))
SEEN = np.array([[True, True, False, False], [False, True, True, True]])
IDS, LABELS = np.array([[1, 6, 3], [6, 0, 2]]), np.array([[0, -1, 2, 1, 0], [1, 1, -1, 0, 2]])
ROUTES = kernels.route(X[0], 2, True)
ORDER = kernels.sort_by_expert(ROUTES[0], 3)
SOURCE, PLACES = kernels.match_slots(ROUTES[0], *ORDER, 6)
CASES = {
    "gelu": (kernels.gelu, X),
    "gelu_backward": (kernels.gelu_backward, DY, X),
    "gelu_erf": (kernels.gelu_erf, X),
    "gelu_erf_backward": (kernels.gelu_erf_backward, DY, X),
    "silu": (kernels.silu, X),
    "silu_backward": (kernels.silu_backward, DY, X),
    "relu": (kernels.relu, X),
    "relu_backward": (kernels.relu_backward, DY, X),
    "tanh": (kernels.tanh, X),
    "tanh_backward": (kernels.tanh_backward, DY, X),
    "norm": (kernels.norm, X, X[0, 0], X[0, 1], True, 1e-5, 3),
    "norm by squares": (kernels.norm, X, X[0, 0], None, False, 1e-5, 7, lambda local: 2 * local),
    "norm_backward": (kernels.norm_backward, DY, X, X[0, 0], (X[..., 0], X[..., 1]), 3),
    "norm_backward by squares": (kernels.norm_backward, DY, X, X[0, 0], (None, X[..., 1]), 3),
    "attention": (kernels.attention, *HEADS[:3]),
    "attention_backward": (kernels.attention_backward, *HEADS, STATISTICS),
    "attention of all keys": (kernels.attention, *HEADS[:3], False),
    "attention of some keys": (kernels.attention, *HEADS[:3], True, SEEN),
    "attention_backward of some keys": (kernels.attention_backward, *HEADS, STATISTICS, True, SEEN),
    "lookup": (kernels.lookup, X[0], IDS, 2),
    "lookup_backward": (kernels.lookup_backward, RNG.standard_normal((2, 3, 4)), IDS, 2, 5),
    "route": (kernels.route, X[0], 2, True),
    "route_backward": (kernels.route_backward, DY[0, :, :2], *ROUTES[:3], True, DY[0], DY[0, :, 0]),
    "routing_sums": (kernels.routing_sums, ROUTES[0], *ROUTES[2:], X[0, :, 0] > 0, (1, 5)),
    "sort_by_expert": (kernels.sort_by_expert, ROUTES[0], 3),
    "match_slots": (kernels.match_slots, ROUTES[0], *ORDER, 6),
    "fill_slots": (kernels.fill_slots, X[0], SOURCE, 2, ROUTES[1]),
    "take_slots": (kernels.take_slots, RNG.standard_normal((18, 4)), PLACES, 2),
    "unfold": (kernels.unfold, HEADS[0], (3, 2), (1, 2), (1, 2)),
    "fold": (kernels.fold, RNG.standard_normal((2, 4, 3, 2, 12)), (3, 5), (1, 2), (1, 2)),
    "max_pool": (kernels.max_pool, HEADS[0], (3, 2), (1, 2), (1, 1)),
    "max_pool_backward": (
        *(kernels.max_pool_backward, HEADS[0], np.abs(2 * HEADS[1]).astype("int32")),
        *((3, 8), (3, 2), (1, 2), (1, 1)),
    ),
    "mean_pool": (kernels.mean_pool, HEADS[0], (3, 2), (1, 2), (1, 1)),
    "mean_pool_backward": (kernels.mean_pool_backward, HEADS[0], (3, 8), (3, 2), (1, 2), (1, 1)),
    "peak": (kernels.peak, X),
    "cross_entropy_sums": (kernels.cross_entropy_sums, X, LABELS, X[..., 0], 1),
    "cross_entropy_smoothed": (kernels.cross_entropy_sums, X, LABELS, X[..., 0], 1, 0.9, 0.02),
    "cross_entropy_losses": (kernels.cross_entropy_losses, X[0], np.abs(X) + 1.0, X[0] > 0, 0.1),
    "cross_entropy_backward": (kernels.cross_entropy_backward, X, LABELS, X[..., 0], np.abs(X[..., 1]), 1, 0.5),
    "cross_entropy_backward_all": (
        *(kernels.cross_entropy_backward, X, LABELS, X[..., 0], np.abs(X[..., 1]), 1, 0.5),
        *(0.9, 0.02, 0.1),
    ),
}


def mapped(function, values):
    """Return nested tuples of arrays with a function applied to each array."""
    if isinstance(values, tuple):
        return tuple(mapped(function, value) for value in values)
    return function(values) if hasattr(values, "shape") else values


def leaves(values):
    return [leaf for value in values for leaf in leaves(value)] if isinstance(values, tuple) else [values]


def same(ours, theirs, **tolerance):
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.allclose(np.asarray(one), np.asarray(other), **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_the_same_in_the_strict_namespace(name):
    kernel, *arguments = CASES[name]
    plain = kernel(*mapped(np.copy, tuple(arguments)))
    other = kernel(*mapped(lambda a: strict.asarray(a, copy=True), tuple(arguments)))
    same(plain, other, rtol=1e-14, atol=1e-15)


def test_lookup_backward_adds_equal_rows():
    dy = RNG.standard_normal((2, 3, 4))
    table = np.zeros((9, 4))
    np.add.at(table, IDS, dy)
    assert np.allclose(kernels.lookup_backward(dy, IDS, 2, 5), table[2:7], rtol=1e-15, atol=0)


def test_lookup_backward_adds_rows_of_one_id_that_are_far_apart(monkeypatch):
    monkeypatch.setattr(table_kernels, "STRETCH", 4)
    ids = np.array([[3, 9, 3, 3, 5, 3, 3], [3, 3, 3, 3, 4, 3, 8], [0, 5, 5, 5, 5, 5, 5]])  # 3 fills two stretches
    dy = RNG.standard_normal((*ids.shape, 4))
    table = np.zeros((10, 4))
    np.add.at(table, ids, dy)
    for start, count in ((0, 10), (2, 5), (3, 1), (6, 2), (5, 0)):
        mine = kernels.lookup_backward(dy, ids, start, count)
        assert mine.shape == (count, 4)
        assert abs(mine - table[start : start + count]).max(initial=0) <= 21 * np.finfo(dy.dtype).eps * abs(dy).max()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_normal_distribution_is_that_of_the_error_function(dtype):
    x = np.concatenate([np.linspace(-37, 37, 20001), [0.0, 1e9, -1e9, np.inf, -np.inf]]).astype(dtype)
    eps, cdf = np.finfo(dtype).eps, normal_cdf(x)
    exact = np.array([0.5 * math.erfc(-float(value) * math.sqrt(0.5)) for value in x])
    assert cdf.dtype == dtype
    assert np.all(abs(cdf - exact) <= 2 * eps)
    tail = (x < 0) & (exact > np.finfo(dtype).tiny)
    # 2 of the 4 allow for the rounding of x sqrt(1/2) in the reference itself.
    assert np.all(abs(cdf - exact)[tail] <= 4 * eps * (1 + x[tail] ** 2 / 2) * exact[tail])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_norm_whose_squares_overflow_is_0(centred):
    x, gain = np.array([[1e20, -2e20, 3e20, 0]], "float32"), np.ones(4, "float32")
    y, statistics = kernels.norm(x, gain, None, centred, 1e-5, 4)
    dx, *_ = kernels.norm_backward(x * np.float32(1e-20), x, gain, statistics, 4)
    assert not y.any()
    assert not dx.any()


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_large_scores_and_logits_lose_no_digits(shift):
    logits = (X + shift).astype("float32")
    exact = np.exp(logits.astype("float64") - logits.max())
    exact /= exact.sum(-1, keepdims=True)
    top = kernels.peak(logits)
    total = kernels.cross_entropy_sums(logits, LABELS, top, 0)[0]
    gradient = kernels.cross_entropy_backward(logits, np.full(LABELS.shape, 3), top, total, 0, 1.0)
    assert abs(gradient - exact).max() <= 8 * np.finfo("float32").eps


def test_a_provider_from_outside_serves_the_layers_of_its_grid_alone(monkeypatch):
    module = ModuleType("outside")
    module.relu = lambda x: kernels.relu(x) + 1
    monkeypatch.setitem(sys.modules, "outside", module)
    monkeypatch.setattr(provider, "PROVIDERS", dict(provider.PROVIDERS))
    provider.register_provider("outside", "outside", "The positive part and one more.")
    grid, other = Grid(MPI.COMM_SELF), Grid(MPI.COMM_SELF)
    assert provider.use("outside", grid) == "outside"
    values = {g: ReLU().forward(from_global(X, g, Layout(None, None, None)), Context())[0].local for g in (grid, other)}
    assert np.array_equal(values[grid], values[other] + 1)
    assert provider.of(grid).gelu is kernels.gelu
    assert list(provider.choices()) == ["auto", "reference", "torch", "outside"]


def test_a_meta_grid_has_kernels_without_arithmetic():
    grid = Grid.meta(col=2)
    assert provider.use("torch", grid) == "torch"
    assert provider.of(grid).name == "meta"
    assert provider.of(grid).gelu is kernels.gelu


def test_an_unknown_or_a_second_provider_is_refused():
    with pytest.raises(OptionError, match="kernels='cuda': use one of 'auto', 'reference', 'torch'"):
        provider.use("cuda", Grid(MPI.COMM_SELF))
    with pytest.raises(OptionError, match="kernels='torch': there is already a choice of this name"):
        provider.register_provider("torch", "outside", "Another one.")


@pytest.mark.parametrize(("name", "requires"), [("no_such_kernels", None), ("outside", "no_such.package")])
def test_a_provider_that_cannot_be_imported_is_refused(name, requires, monkeypatch):
    monkeypatch.setattr(provider, "PROVIDERS", dict(provider.PROVIDERS))
    provider.register_provider(f"{name} absent", name, "Cannot be imported.", requires)
    with pytest.raises(OptionError, match=rf"{requires or name} cannot be imported \(No module named 'no_such"):
        provider.use(f"{name} absent", Grid(MPI.COMM_SELF))
