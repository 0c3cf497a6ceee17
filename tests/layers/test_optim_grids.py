"""AdamW equals PyTorch's, and the distributed steps of AdamW and Muon equal one rank's."""

import math

import numpy as np
import pytest
from mpi4py import MPI

from colossal_mpi import Grid, Layout, OptionError, from_global
from colossal_mpi.layers import Context, Parallelism, Parameter
from colossal_mpi.layers.loss import CrossEntropy
from colossal_mpi.layers.models import GPT
from colossal_mpi.layers.optim import SGD, AdamW, Muon, gradient_norm
from tests.cases import host
from tests.reference import gpt_case as case


def steps(grid, tensor, kind=AdamW):
    """Return the norms of the gradients and the model after three clipped steps."""
    p = Parallelism(grid, tensor)
    model, loss = GPT(case.CONFIG, p), CrossEntropy(p)
    optimizer, norms = kind(model.parameters(), lr=1e-2, clip=0.5), []
    for step in range(3):
        tokens = (case.TOKENS + step) % case.CONFIG.vocabulary
        ids, labels = (from_global(a, grid, p.tokens()) for a in (tokens, case.LABELS))
        logits, cache = model.forward(ids, Context(step))
        model.backward(loss.backward(loss.forward(logits, labels, case.COUNT)[1]), cache)
        norms.append(optimizer.step())
    return norms, model


def prepare(path):
    for kind in (AdamW, Muon):
        norms, model = steps(Grid(MPI.COMM_SELF), None, kind)
        weights = {p.name: host(p.value) for p in model.parameters()}
        np.savez(path / f"{kind.__name__}.npz", norms=norms, **weights)


def check(grid, tensor, prepared, kind=AdamW):
    exact = dict(np.load(prepared / f"{kind.__name__}.npz"))
    norms, model = steps(grid, tensor, kind)
    assert np.allclose(norms, exact.pop("norms"), rtol=1e-10, atol=0)
    mine = {p.name: case.block_and_index(p.value) for p in model.parameters()}
    # Adam divides by the root of the second moment, which turns the noise of a gradient that is exactly zero, as of
    # the key bias, into steps. The test compares only weights whose gradient is not zero.
    bias = {name for name in mine if name.endswith("qkv.bias")}
    assert case.difference({n: v for n, v in mine.items() if n not in bias}, exact) <= 1e-9
    for name in bias:
        block, index = mine[name]
        kept = [t - (index[0].start or 0) for t in (0, 2) if index[0].start <= t < index[0].stop]
        whole = exact[name][index]
        assert np.max(abs(block[kept] - whole[kept]), initial=0) <= 1e-9 * abs(exact[name][[0, 2]]).max()


@pytest.mark.prepare(prepare)
@pytest.mark.parametrize("tensor", ["2.5d", "3d"])
@pytest.mark.grids({"row": 2, "col": 2}, {"depth": 2, "row": 2, "col": 2})
def test_steps_of_muon(grid, tensor, prepared):
    check(grid, tensor, prepared, Muon)


@pytest.mark.prepare(prepare)
@pytest.mark.smoke
@pytest.mark.grids({"row": 2, "col": 2}, {"data": 2, "row": 2, "col": 2}, {"row": 2, "col": 3})
def test_steps_2d(grid, prepared):
    check(grid, "2d", prepared)


@pytest.mark.prepare(prepare)
@pytest.mark.grids({"row": 2, "col": 2, "depth": 2}, {"data": 2, "col": 3})
def test_steps_3d(grid, prepared):
    check(grid, "3d", prepared)


@pytest.mark.prepare(prepare)
@pytest.mark.grids({"depth": 2, "row": 2, "col": 2})
def test_steps_25d(grid, prepared):
    check(grid, "2.5d", prepared)


def parameters(grid, shapes):
    made = [
        Parameter(f"{i}.weight", s, Layout(*[None] * len(s)), Parallelism(grid), std=1.0, dtype="float64")
        for i, s in enumerate(shapes)
    ]
    return made


@pytest.mark.parametrize("clip", [None, 0.3], ids=["unclipped", "clipped"])
def test_adamw_equals_pytorch(clip):
    torch = pytest.importorskip("torch")
    ours = parameters(Grid(MPI.COMM_SELF), [(3, 4), (5,)])
    theirs = [torch.nn.Parameter(torch.tensor(host(p.value).copy())) for p in ours]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    mine, rng = AdamW(ours, lr=1e-2, clip=clip), np.random.default_rng(0)
    for _ in range(4):
        for p, t in zip(ours, theirs, strict=True):
            g = rng.standard_normal(p.value.shape)
            p.accumulate(p.value.like(g))
            t.grad = torch.tensor(g)
        norm = mine.step()
        total = torch.linalg.vector_norm(torch.cat([t.grad.reshape(-1) for t in theirs])).item()
        assert norm == pytest.approx(total, rel=1e-13)
        if clip:
            for t in theirs:
                t.grad *= clip / total
        reference.step()
    for p, t in zip(ours, theirs, strict=True):
        assert np.allclose(host(p.value), t.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.grids({"data": 2, "row": 2}, {"row": 2, "col": 3})
def test_norm_counts_each_global_element_once(grid):
    p = Parallelism(grid, "2d")
    matrix = Parameter("m", (7, 5), Layout(None, "col" if "col" in grid.axes else None), p, dtype="float64")
    vector = Parameter("v", (5,), Layout(None), p, dtype="float64")
    values = {"m": np.arange(35.0).reshape(7, 5), "v": np.arange(5.0)}
    gradients = [from_global(values[p.name], grid, p.value.layout) for p in (matrix, vector)]
    exact = math.sqrt(sum((v**2).sum() for v in values.values()))
    assert gradient_norm(gradients) == pytest.approx(exact, rel=1e-15)


@pytest.mark.grids({}, {"data": 2})
@pytest.mark.parametrize(
    ("size", "dtype"), [(1e200, "float64"), (1e-200, "float64"), (3e307, "float64"), (3e38, "float32")]
)
def test_gradients_of_any_size_are_clipped_to_the_norm(grid, size, dtype):
    p = Parallelism(grid)
    w = Parameter("w", (4, 9), Layout(None, None), p, std=1.0, dtype=dtype)
    before, whole = host(w.value).astype("float64"), np.arange(36.0).reshape(4, 9) / 36
    clip = min(1.0, size)
    optimizer = SGD([w], lr=1.0, momentum=0.0, clip=clip)
    # every rank of data has an equal part of the gradient
    w.accumulate(from_global((whole * size).astype(dtype), grid, Layout(None, None, partial=tuple(grid.axes))))
    assert optimizer.step() == pytest.approx(size * np.linalg.norm(whole), rel=1e-6 if dtype == "float32" else 1e-14)
    step = (before - host(w.value).astype("float64")) / clip
    bound = 1e-6 if dtype == "float32" else 1e-14
    assert np.allclose(step, whole / np.linalg.norm(whole), rtol=0, atol=bound) or clip < 1e-20


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_greatest_norm_that_would_erase_or_turn_gradients_is_refused(clip):
    with pytest.raises(OptionError, match="AdamW: clip=.* the greatest norm must be above 0"):
        AdamW(parameters(Grid(MPI.COMM_SELF), [(3, 4)]), clip=clip)
