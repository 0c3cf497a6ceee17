"""PyTorch's kernels equal the reference to rounding, and fall back to it, bitwise, where PyTorch has no kernel."""

import subprocess
import sys

import array_api_strict as strict
import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid
from colossal_mpi.layers import kernels
from colossal_mpi.layers.kernels import reference
from tests.cases import host
from tests.reference import gpt_case

pytest.importorskip("torch")

from colossal_mpi.layers.kernels import torch as by_torch

TORCH = kernels.load("torch")
RNG = np.random.default_rng(3)
B, S, H = 3, 7, 13
X, DY = RNG.standard_normal((2, B, S, H))
GAIN, BIAS = RNG.standard_normal((2, H))
Q, DO = RNG.standard_normal((2, B, S, 6, 5))
KEYS, VALUES = RNG.standard_normal((2, B, S, 2, 5))
SEEN = np.array([[True] * S, [False] * 3 + [True] * (S - 3), [False] * S])
IDS = RNG.integers(0, 11, (B, S))


def elementwise(name):
    def both(k, x, dy):
        return getattr(k, name)(x), getattr(k, f"{name}_backward")(dy, x)

    return both, 1, X, DY


def norm(k, x, dy, gain, bias):
    y, statistics = k.norm(x, gain, bias, True, 1e-5, x.shape[-1])
    return y, statistics, k.norm_backward(dy, x, gain, statistics, x.shape[-1])


def root_mean_square(k, x, dy, gain):
    y, statistics = k.norm(x, gain, None, False, 1e-5, x.shape[-1])
    return y, statistics, k.norm_backward(dy, x, gain, statistics, x.shape[-1])


def attention(causal, mask=None):
    def both(k, q, keys, values, do):
        out, statistics = k.attention(q, keys, values, causal, mask)
        return out, k.attention_backward(do, q, keys, values, out, statistics, causal, mask)

    return both


CASES = {
    **{name: elementwise(name) for name in ("gelu", "gelu_erf", "silu", "relu")},
    "norm": (norm, B * S, X, DY, GAIN, BIAS),
    "norm by squares": (root_mean_square, B * S, X, DY, GAIN),
    "lookup": (lambda k, table, dy: (k.lookup(table, IDS, 0), k.lookup_backward(dy, IDS, 0, 11)), B * S, X[0], DY),
    "lookup in a piece": (lambda k, dy: k.lookup_backward(dy, IDS, 4, 5), B * S, DY),
    "causal attention": (attention(True), 3 * S + 5, Q, KEYS, VALUES, DO),
    "attention of all keys": (attention(False), 3 * S + 5, Q, KEYS, VALUES, DO),
    "causal attention of some keys": (attention(True, SEEN), 3 * S + 5, Q, KEYS, VALUES, DO),
    "attention of some keys": (attention(False, SEEN), 3 * S + 5, Q, KEYS, VALUES, DO),
}
"""For each case, a function that calls a kernel and its adjoint, the terms of their longest sum, and the arrays."""

ROUNDINGS = 20
"""Error of the elementary functions around the sums, in units of eps: ATen's exponential alone may be wrong by 20 units
in the last place (SLEEF's ``exp_u20`` is named after that)."""

FORMS = {
    "whole": lambda a: a,
    "steps": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "fortran": np.asfortranarray,
    "backwards": lambda a: a[..., ::-1].copy()[..., ::-1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


def leaves(values):
    return [leaf for value in values for leaf in leaves(value)] if isinstance(values, tuple) else [values]


def compare(mine, exact, terms):
    for one, other in zip(leaves(mine), leaves(exact), strict=True):
        if other is not None:
            size = np.max(abs(other), initial=1.0)
            assert one.shape == other.shape
            assert np.max(abs(one - other), initial=0.0) <= (terms + ROUNDINGS) * np.finfo(one.dtype).eps * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_is_that_of_the_reference_to_rounding(name, dtype, form):
    case, terms, *arrays = CASES[name]
    arrays = [FORMS[form](a.astype(dtype)) for a in arrays]
    mine, exact = case(TORCH, *arrays), case(reference, *[a.astype("float64") for a in arrays])
    assert {one.dtype for one in leaves(mine) if one is not None} == {np.dtype(dtype)}
    compare(mine, exact, terms)


@pytest.mark.parametrize("name", CASES)
def test_torch_does_what_it_is_there_for(name, monkeypatch):
    shared, share = [], by_torch._share
    monkeypatch.setattr(by_torch, "_share", lambda result: shared.append(1) or share(result))
    monkeypatch.setattr(by_torch.torch, "get_num_threads", lambda: 2)
    case, _, *arrays = CASES[name]
    case(TORCH, *arrays)
    expected = {"norm by squares": 0, "lookup": 1, "lookup in a piece": 1}.get(name, 2)
    assert sum(shared) >= expected


@pytest.mark.parametrize("mask", [None, SEEN], ids=["whole", "some"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_statistics_of_attention_are_either_providers(causal, mask):
    arrays = Q, KEYS, VALUES
    exact, given = (k.attention(*arrays, causal, mask) for k in (reference, by_torch))
    wanted = reference.attention_backward(DO, *arrays, *exact, causal, mask)
    compare(reference.attention_backward(DO, *arrays, *given, causal, mask), wanted, 3 * S + 5)
    compare(by_torch.attention_backward(DO, *arrays, *exact, causal, mask), wanted, 3 * S + 5)
    logarithms = [peak + np.log(np.where(total > 0, total, 1)) for _, (peak, total) in (exact, given)]
    seen = exact[1][1] > 0
    assert np.array_equal(seen, given[1][1] > 0)
    compare(logarithms[1][seen], logarithms[0][seen], S + 5)


def test_positions_and_parts_of_the_keys_are_the_references():
    order = np.arange(S)[::-1].copy(), np.arange(S)[::-1].copy()
    for k, v, options in ((KEYS, VALUES, (True, None, order)), (KEYS[:, :4], VALUES[:, :4], (True,))):
        pair = [leaves(p.attention(Q, k, v, *options)) for p in (by_torch, reference)]
        assert all(np.array_equal(*both) for both in zip(*pair, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_empty_blocks(name):
    case, terms, *arrays = CASES[name]
    if "lookup" in name or "some" in name:
        pytest.skip("ids and masks are not of the case's arrays: test_no_tokens_and_no_rows")
    batch = [a[:0] if a.ndim > 1 else a for a in arrays]
    compare(case(TORCH, *batch), case(reference, *batch), terms)
    if "attention" in name:
        heads = [a[:, :0] for a in arrays]
        compare(case(TORCH, *heads), case(reference, *heads), terms)


def test_no_tokens_and_no_rows():
    dy, ids = X[:, :0], IDS[:, :0]
    assert np.array_equal(by_torch.lookup_backward(dy, ids, 0, 4), np.zeros((4, H)))
    assert by_torch.lookup_backward(X, IDS, 5, 0).shape == (0, H)


def strict_blocks(arrays):
    return [strict.asarray(a) for a in arrays], [strict.asarray(a) for a in arrays]


def backwards(arrays):
    return ([FORMS["backwards"](a) for a in arrays] for _ in range(2))


def extended(arrays):
    return ([a.astype(np.longdouble) for a in arrays] for _ in range(2))


@pytest.mark.parametrize("blocks", [strict_blocks, backwards, extended])
@pytest.mark.parametrize("name", ["gelu_erf", "silu", "relu", "norm", "causal attention"])
def test_what_torch_cannot_view_is_the_reference_to_the_bit(name, blocks):
    case, _, *arrays = CASES[name]
    for one, other in zip(
        *[leaves(case(k, *a)) for k, a in zip((TORCH, reference), blocks(arrays), strict=True)], strict=True
    ):
        assert type(one) is type(other)
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_norm_over_a_cut_dim_is_the_reference_to_the_bit():
    of = [k.norm(X, GAIN, BIAS, True, 1e-5, 2 * H, lambda local: 2 * local) for k in (by_torch, reference)]
    assert all(np.array_equal(*pair) for pair in zip(*map(leaves, of), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", ["whole", "steps", "fortran", "backwards"])
def test_adamw_is_that_of_the_reference_to_rounding(form, dtype):
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    state = [X, DY, 0.1 * DY, DY**2]
    mine, exact = [FORMS[form](a.astype(dtype)) for a in state], [a.astype(dtype).astype("float64") for a in state]
    by_torch.adamw(*mine, 3, **options)
    reference.adamw(*exact, 3, **options)
    compare(tuple(mine), tuple(exact), 1)
    assert np.array_equal(mine[1], DY.astype(dtype))  # a gradient stays as it is


def test_two_models_in_one_process_train_alike_with_different_providers():
    exact_grid, grid = Grid(MPI.COMM_SELF), Grid(MPI.COMM_SELF)
    assert kernels.use("torch", grid) == "torch"
    loss, model = gpt_case.run(exact_grid, None)
    torch_loss, torch_model = gpt_case.run(grid, None)
    exact = {p.name: host(p.grad) for p in model.parameters()}
    assert abs(torch_loss - loss) <= 1e-12 * loss
    blocks = {p.name: gpt_case.block_and_index(p.grad) for p in torch_model.parameters()}
    assert 0 < gpt_case.difference(blocks, exact) <= 1e-10
    assert (kernels.of(exact_grid).name, kernels.of(grid).name) == ("reference", "torch")


def test_auto_takes_torch_and_the_reference_computes_what_torch_lacks():
    grid = Grid(MPI.COMM_SELF, data=1, pipe=1)
    assert kernels.use("auto", grid) == "torch"
    assert kernels.of(grid).silu is by_torch.silu
    assert kernels.of(grid).peak is reference.peak
    assert kernels.of(grid.at(pipe=0)) is kernels.of(grid)
    assert kernels.use("reference", grid) == "reference"
    assert kernels.of(grid).silu is reference.silu


WITHOUT = """
import sys
sys.modules["torch"] = None
from mpi4py import MPI
from colossal_mpi import Grid, OptionError
from colossal_mpi.layers import kernels
print(kernels.use("auto", Grid(MPI.COMM_SELF)))
try:
    kernels.use("torch", Grid(MPI.COMM_SELF))
except OptionError as problem:
    print(problem)
"""


def test_without_torch_auto_is_the_reference_and_torch_is_refused():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True, timeout=60)
    first, second = done.stdout.splitlines()
    assert first == "reference"
    assert second.startswith("kernels='torch': torch cannot be imported (")
    assert second.endswith("): install it, or use 'auto'")


def test_the_layers_import_no_torch_unasked():
    code = (
        "import sys; from colossal_mpi.layers import kernels; kernels.load('reference'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
