"""Attention in tiles equals PyTorch's, also in parts of the keys and in other libraries, and needs linear memory."""

import itertools
import tracemalloc
from importlib import import_module

import array_api_strict as strict
import ml_dtypes
import numpy as np
import pytest
import threadpoolctl
import torch

from colossal_mpi.layers.kernels import reference as kernels
from colossal_mpi.layers.kernels.reference import tiles
from tests.reference.torch_attention import attend, rotate

formulas = import_module("colossal_mpi.layers.kernels.reference.attention")
RNG = np.random.default_rng(0)
B, D = 3, 4
SIZES = [(9, 9, 2, 3), (7, 5, 1, 4), (5, 8, 3, 1), (1, 6, 2, 2), (6, 1, 2, 2)]
"""Queries, keys, groups and heads of a group."""
MASKS = {"all": None, "some": lambda t: RNG.random((B, t)) > 0.5, "none": lambda t: np.zeros((B, t), bool)}
POSITIONS = {
    "indices": None,
    "one": lambda s, t: (RNG.permutation(s), RNG.permutation(t)),
    "each": lambda s, t: (RNG.integers(0, 5, (B, s)), RNG.integers(0, 5, (B, t))),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Limit BLAS to one thread: in such small products, threads that wait for one another cost more than they save."""
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture(params=[(256, 1 << 18), (3, 1 << 18), (4, 7), (2, 1)], ids=lambda cut: f"{cut[0]}x{cut[1]}")
def cut(request, monkeypatch):
    """Cut attention into tiles of at most this number of queries or keys, and of scores."""
    monkeypatch.setattr(tiles, "LENGTH", request.param[0])
    monkeypatch.setattr(tiles, "SCORES", request.param[1])
    monkeypatch.setattr(tiles, "LEAST", 1)


def operands(s, t, g, r, dtype="float64"):
    q, do = RNG.standard_normal((2, B, s, g * r, D)).astype(dtype)
    k, v = RNG.standard_normal((2, B, t, g, D)).astype(dtype)
    return do, q, k, v


def both(do, q, k, v, *seen):
    """Return output and cotangents."""
    out, statistics = kernels.attention(q, k, v, *seen)
    return out, *kernels.attention_backward(do, q, k, v, out, statistics, *seen)


def exact(do, q, k, v, causal=True, mask=None, positions=None, window=None):
    leaves = [torch.tensor(x.astype("float64"), requires_grad=True) for x in (q, k, v)]
    at = None if positions is None else [torch.tensor(x) for x in positions]
    y = attend(*leaves, causal, None if mask is None else torch.tensor(mask), at, window)
    y.backward(torch.tensor(do.astype("float64")))
    return y.detach().numpy(), *(x.grad.numpy() for x in leaves)


def error(mine, theirs):
    """Return the greatest error relative to an array's greatest element, or to 1."""
    return max(abs(x - y).max() / max(1.0, abs(y).max()) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "any"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
def test_tiles_equal_torch(cut, size, causal):
    s, t = size[:2]
    for mask, positions in itertools.product(MASKS.values(), POSITIONS.values()):
        arrays, seen = operands(*size), (causal, mask and mask(t), positions and positions(s, t))
        with np.errstate(all="raise", under="ignore"):
            mine = both(*arrays, *seen)
        assert [x.shape for x in mine] == [x.shape for x in (arrays[1], *arrays[1:])]
        assert error(mine, exact(*arrays, *seen)) <= 64 * np.finfo("float64").eps


@pytest.mark.parametrize("window", [1, 3, 20, "each"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
def test_a_window_hides_the_keys_before_it(cut, size, window):
    s, t = size[:2]
    window = RNG.integers(1, 6, (B, s)) if window == "each" else window
    ranges = range(4, 4 + s), range(2, 2 + t)
    unsigned = tuple(RNG.integers(0, 9, n).astype("u1") for n in (s, t))
    for mask, positions in itertools.product(MASKS.values(), [None, ranges, unsigned, POSITIONS["each"](s, t)]):
        arrays, seen = operands(*size), (True, mask and mask(t), positions, window)
        at = positions and tuple(np.asarray(x, "i8") for x in positions)
        assert error(both(*arrays, *seen), exact(*arrays, *seen[:2], at, window)) <= 64 * np.finfo("float64").eps


def test_keys_may_come_in_parts(cut):
    do, q, k, v = operands(9, 11, 2, 3)
    mask, at = RNG.random((B, 11)) > 0.4, (np.arange(2, 11), np.arange(11))
    cuts = [slice(7, 11), slice(0, 3), slice(3, 3), slice(3, 7)]
    parts = [(k[:, c], v[:, c], (True, mask[:, c], (at[0], at[1][c]))) for c in cuts]
    out, statistics = kernels.attention(q, *parts[0][:2], *parts[0][2])
    for some_k, some_v, seen in parts[1:]:
        more = kernels.attention(q, some_k, some_v, *seen)
        out, statistics = kernels.attention_merge((out, statistics), more)
    grads = [kernels.attention_backward(do, q, *part[:2], out, statistics, *part[2]) for part in parts]
    dk, dv = (np.zeros_like(k) for _ in range(2))
    for c, (_, some_dk, some_dv) in zip(cuts, grads, strict=True):
        dk[:, c], dv[:, c] = some_dk, some_dv
    mine = out, sum(dq for dq, _, _ in grads), dk, dv
    assert error(mine, exact(do, q, k, v, True, mask, at)) <= 64 * np.finfo("float64").eps


def test_tiles_give_the_same_in_the_strict_namespace(cut):
    arrays, seen = operands(5, 7, 2, 2), (True, RNG.random((B, 7)) > 0.4, (RNG.permutation(5), RNG.permutation(7)))
    theirs = [strict.asarray(x) for x in arrays]
    mine = both(*theirs, True, strict.asarray(seen[1]), tuple(strict.asarray(x) for x in seen[2]))
    assert error([np.asarray(x) for x in mine], both(*arrays, *seen)) <= 1e-15
    pair = kernels.attention(*arrays[1:])
    merged = kernels.attention_merge(*[tuple(strict.asarray(x) for x in pair)] * 2)
    assert error([np.asarray(merged[0])], [pair[0]]) <= 1e-15


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_floats_are_summed_in_32(cut, dtype):
    arrays = operands(9, 9, 2, 3, dtype)
    mine = both(*arrays)
    assert {x.dtype for x in mine} == {np.dtype(dtype)}
    # Inputs are exact, results rounded once, and the backward pass starts at a rounded output.
    assert error([x.astype("float64") for x in mine], exact(*arrays)) <= 4 * float(ml_dtypes.finfo(dtype).eps)


def test_large_scores_lose_no_digits(cut):
    """The scores are above 10^5; float32 holds them exactly, and they differ by halves of small integers."""
    q = np.full((1, 9, 1, 4), 512.0, "float32")
    k = RNG.integers(0, 3, (1, 9, 1, 4)).astype("float32") / 512 + np.float32(128.0)
    do, v = RNG.standard_normal((2, 1, 9, 1, 4)).astype("float32")
    assert (q[0, :, 0] @ k[0, :, 0].T / 2).min() >= 1e5
    assert error(both(do, q, k, v)[:1], exact(do, q, k, v)[:1]) <= 8 * np.finfo("float32").eps


def test_tiles_above_the_diagonal_are_skipped(monkeypatch):
    monkeypatch.setattr(tiles, "LENGTH", 8)
    monkeypatch.setattr(tiles, "LEAST", 8)
    done, scores = [], formulas._scores
    monkeypatch.setattr(formulas, "_scores", lambda q, k: done.append(k.shape[2] * q.shape[2]) or scores(q, k))
    both(*operands(64, 64, 1, 1), True)
    assert sum(done) == 2 * 64 * (8 * 9 // 2)
    done.clear()
    zigzag = np.concatenate([np.arange(16), np.arange(112, 128)])
    both(*operands(32, 32, 1, 1), True, None, (zigzag, zigzag))
    assert sum(done) == 2 * 64 * (4 * 5 // 2)


def test_tiles_before_the_window_are_skipped(monkeypatch):
    monkeypatch.setattr(tiles, "LENGTH", 8)
    monkeypatch.setattr(tiles, "LEAST", 8)
    done, scores = [], formulas._scores
    monkeypatch.setattr(formulas, "_scores", lambda q, k: done.append(k.shape[2] * q.shape[2]) or scores(q, k))
    both(*operands(64, 64, 1, 1), True, None, None, 9)
    assert sum(done) == 2 * 64 * (8 + 7) == 2 * tiles.attention_scores(64, 64, window=9)
    done.clear()
    both(*operands(64, 64, 1, 1), True, None, (range(64, 128), range(64)), 9)
    assert sum(done) == 2 * 64 == 2 * tiles.attention_scores(64, 64, window=9, offset=64)
    done.clear()
    both(*operands(64, 64, 1, 1), True, None, None, np.tile(np.arange(64) % 16 + 1, (B, 1)))  # documents of 16 tokens
    assert sum(done) == 2 * 64 * 4 * 3


def test_memory_grows_linearly():
    """The length grows from 1k to 4k; with s x s scores the second step would be four times the first."""
    peaks = [peak(s) for s in (1024, 2048, 4096)]
    assert peaks[2] - peaks[1] <= 2.05 * (peaks[1] - peaks[0])
    assert peaks[2] <= 4096 * 4096 * 4


def peak(s):
    """Return the peak of memory in bytes of forward and backward, for one head of width 32 in float32."""
    do, q, k, v = (RNG.standard_normal((1, s, 1, 32)).astype("float32") for _ in range(4))
    tracemalloc.start()
    both(do, q, k, v)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("positions", [np.arange(9), RNG.integers(0, 50, (B, 9))], ids=["one", "each"])
def test_rotation_equals_torch_and_its_adjoint_is_its_inverse(positions):
    x = RNG.standard_normal((B, 9, 2, 3, 6))
    angle = positions[..., None] * 100.0 ** (-np.arange(0, 6, 2) / 6)
    y = kernels.rotate(x, np.cos(angle), np.sin(angle))
    theirs = rotate(torch.tensor(x).flatten(2, 3), torch.tensor(positions), 100.0).numpy()
    assert abs(y.reshape(theirs.shape) - theirs).max() <= 1e-13
    assert abs(kernels.rotate(y, np.cos(angle), -np.sin(angle)) - x).max() <= 1e-14
