"""Self-attention with and without a causal order and padding, nothing of which divides, and PyTorch's results."""

import numpy as np

from colossal_mpi import from_global
from colossal_mpi.layers import Context, Parallelism
from colossal_mpi.layers.attention import SelfAttention

B, S, H, A = 7, 9, 20, 5
_rng = np.random.default_rng(2)
X, DY = _rng.standard_normal((2, B, S, H))
LENGTHS = np.array([9, 4, 1, 0, 7, 9, 3])
MASK = np.arange(S) < LENGTHS[:, None]
MASK[4] = MASK[4, ::-1]
"""Sample 3 is all padding, sample 4 is padded in front: with a causal order its first queries see no key."""

CASES = {
    f"{order}-{pad}": (order == "causal", pad == "padded") for order in ("causal", "all") for pad in ("whole", "padded")
}


def run(grid, tensor, case):
    """Return output, cotangent of the input and gradients by name, as DistArrays."""
    causal, padded = CASES[case]
    p = Parallelism(grid, tensor)
    layer = SelfAttention(H, A, p, "attention", causal=causal, std=0.5, out_std=0.5, dtype="float64")
    x, dy = (from_global(a, grid, p.stream()) for a in (X, DY))
    mask = from_global(MASK, grid, p.tokens()) if padded else None
    y, cache = layer.forward(x, Context(mask=mask))
    dx = layer.backward(dy, cache)
    return {"y": y, "dx": dx, **{q.name: q.reduce() for q in layer.parameters()}}, layer


def prepare(path):
    """Write PyTorch's output, cotangent and gradients of every case, from the weights of one rank."""
    import torch
    from mpi4py import MPI

    from colossal_mpi import Grid
    from reference.torch_gpt import attention
    from tests.cases import host

    for case, (causal, padded) in CASES.items():
        _, layer = run(Grid(MPI.COMM_SELF), None, case)
        w = {q.name: torch.tensor(host(q.value), requires_grad=True) for q in layer.parameters()}
        x = torch.tensor(X, requires_grad=True)
        y = attention(x, w, causal, torch.tensor(MASK) if padded else None)
        y.backward(torch.tensor(DY))
        exact = {"y": y.detach(), "dx": x.grad, **{name: v.grad for name, v in w.items()}}
        np.savez(path / f"{case}.npz", **{name: v.numpy() for name, v in exact.items()})
