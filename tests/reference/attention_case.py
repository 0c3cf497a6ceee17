"""Cases of self-attention with sizes that do not divide, and PyTorch's results for them."""

import numpy as np

from colossal_mpi import from_global
from colossal_mpi.layers import Context
from colossal_mpi.layers.attention.rotary import Rotary
from colossal_mpi.layers.attention.self_attention import SelfAttention
from tests.reference.modes import parallelism

B, S, H, A = 7, 9, 20, 5
_rng = np.random.default_rng(2)
X, DY = _rng.standard_normal((2, B, S, H))
LENGTHS = np.array([9, 4, 1, 0, 7, 9, 3])
MASK = np.arange(S) < LENGTHS[:, None]
MASK[4] = MASK[4, ::-1]
"""Sample 3 is all padding, sample 4 is padded in front: with a causal order its first queries see no key."""
POSITIONS = {"shuffled": _rng.permutation(S), "each": _rng.integers(0, 2 * S, (B, S))}

CASES = {
    "causal": {},
    "all": {"causal": False},
    "causal-padded": {"mask": True},
    "all-padded": {"causal": False, "mask": True},
    "rotary": {"rotary": {}, "out_bias": False},
    "shuffled": {"rotary": {}, "positions": "shuffled"},
    # 6 heads in as many groups as the ranks that cut them, more or fewer; and 2 heads in one group.
    "groups-6": {"heads": 6, "groups": 6, "width": 4, "rotary": {}, "bias": False},
    "groups-3": {"heads": 6, "groups": 3, "width": 4, "rotary": {}, "positions": "each", "out_bias": False},
    "groups-2": {"heads": 6, "groups": 2, "width": 3, "mask": True, "causal": False},
    "groups-1": {"heads": 6, "groups": 1, "width": 4, "rotary": {"theta": 50.0}, "mask": True},
    "groups-1-of-2": {"heads": 2, "groups": 1, "width": 4, "bias": False},
}


def run(grid, case, keep_gathered=True):
    """Return output, cotangent of the input and gradients by name, as DistArrays."""
    options = {"heads": A, **CASES[case]}
    mask, positions = options.pop("mask", False), options.pop("positions", None)
    rotary = Rotary(**options.pop("rotary")) if "rotary" in options else None
    p = parallelism(grid, keep_gathered)
    layer = SelfAttention(
        H, options.pop("heads"), p, "attention", rotary=rotary, std=0.5, out_std=0.5, dtype="float64", **options
    )
    x, dy = (from_global(a, grid, p.stream()) for a in (X, DY))
    ctx = Context(
        mask=from_global(MASK, grid, p.tokens()) if mask else None,
        positions=None if positions is None else POSITIONS[positions],
    )
    y, cache = layer.forward(x, ctx)
    dx = layer.backward(dy, cache)
    return {"y": y, "dx": dx, **{q.name: q.reduce() for q in layer.parameters()}}, layer


def prepare(path):
    """Write PyTorch's output, cotangent and gradients of every case, from the weights of one rank."""
    import torch
    from mpi4py import MPI

    from colossal_mpi import Grid
    from tests.cases import host
    from tests.reference.torch_attention import self_attention

    for case, options in CASES.items():
        _, layer = run(Grid(MPI.COMM_SELF), case)
        w = {q.name: torch.tensor(host(q.value), requires_grad=True) for q in layer.parameters()}
        x = torch.tensor(X, requires_grad=True)
        y = self_attention(
            x,
            {name.removeprefix("attention."): v for name, v in w.items()},
            causal=options.get("causal", True),
            mask=torch.tensor(MASK) if options.get("mask") else None,
            positions=torch.tensor(POSITIONS[options["positions"]]) if "positions" in options else None,
            theta=options["rotary"].get("theta", 10000.0) if "rotary" in options else None,
        )
        y.backward(torch.tensor(DY))
        exact = {"y": y.detach(), "dx": x.grad, **{name: v.grad for name, v in w.items()}}
        np.savez(path / f"{case}.npz", **{name: v.numpy() for name, v in exact.items()})
