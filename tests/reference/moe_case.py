"""Mixtures of experts with sizes that do not divide, and PyTorch's results by a loop over the experts."""

import numpy as np

from colossal_mpi import from_global
from colossal_mpi.layers import AuxiliaryLosses, Context
from colossal_mpi.layers.moe import MoE

B, S, H, F = 5, 7, 6, 9
_rng = np.random.default_rng(8)
X, DY = _rng.standard_normal((2, B, S, H))
MASK = np.arange(S) < np.array([7, 3, 0, 5, 6])[:, None]
SHARE = 0.25

CASES = {
    "mixtral": {"experts": 5, "top_k": 2, "activation": "swiglu"},
    "switch": {"experts": 3, "top_k": 1, "activation": "gelu-tanh", "bias": True, "balance": 0.5, "z_loss": 0.1},
    "plain-weights": {"experts": 5, "top_k": 3, "renormalise": False, "activation": "gelu-tanh", "balance": 0.3},
    "masked": {"experts": 5, "top_k": 2, "activation": "geglu", "balance": 2.0, "z_loss": 0.2},
    "microbatch": {"experts": 5, "top_k": 2, "balance": 2.0, "balance_over": "microbatch", "z_loss": 0.2},
    "one-expert": {"experts": 1, "top_k": 1, "activation": "silu", "z_loss": 0.2},
    "starved": {"experts": 5, "top_k": 1, "activation": "gelu-tanh", "balance": 0.5},
}
"""In "starved" expert 3 gets no token, and expert 1 has logits three times as large."""
MASKED = ("masked", "microbatch")


def make(parallelism, case):
    """Return the layer with the router's weights that the case needs."""
    layer = MoE(H, F, parallelism=parallelism, name="moe", std=0.5, out_std=0.5, dtype="float64", **CASES[case])
    if case == "starved":
        weight = layer.router.weight
        whole = weight.value.gather()
        whole[:, 1] *= 3
        whole[:, 3] = 0.5 * whole[:, 1] + 0.5 * whole[:, 4]  # between two others, never the largest
        weight.value = from_global(whole, weight.value.grid, weight.value.layout)
    if layer.experts.layers[0].bias is not None:
        for product in (layer.experts.layers[0], layer.experts.layers[2]):
            bias = product.bias
            whole = np.random.default_rng(9).standard_normal(bias.value.shape)
            bias.value = from_global(whole, bias.value.grid, bias.value.layout)
    return layer


def context(grid, parallelism, case):
    mask = from_global(MASK, grid, parallelism.tokens()) if case in MASKED else None
    return Context(mask=mask, auxiliary=AuxiliaryLosses(SHARE, {}))


def run(grid, parallelism, case):
    """Return output, cotangent of the input and gradients by name, as DistArrays, and the losses."""
    layer, ctx = make(parallelism, case), context(grid, parallelism, case)
    x, dy = (from_global(a, grid, parallelism.stream()) for a in (X, DY))
    y, cache = layer.forward(x, ctx)
    later = []
    dx = layer.backward(dy, cache, later)
    for work in later:
        work()
    return {"y": y, "dx": dx, **{q.name: q.reduce() for q in layer.parameters()}}, ctx.auxiliary.values, layer


def run_in_microbatches(grid, parallelism, case, microbatches):
    """Return the gradients by name and the losses of a masked step that is cut into microbatches."""
    layer, losses = make(parallelism, case), {}
    for rows in np.array_split(np.arange(B), microbatches):
        x, dy = (from_global(a[rows], grid, parallelism.stream()) for a in (X, DY))
        mask = from_global(MASK[rows], grid, parallelism.tokens())
        ctx = Context(mask=mask, auxiliary=AuxiliaryLosses(SHARE * len(rows) / B, {}))
        layer.backward(dy, layer.forward(x, ctx)[1])
        for name, value in ctx.auxiliary.values.items():
            losses[name] = losses.get(name, 0) + value
    return {q.name: q.reduce() for q in layer.parameters()}, losses


def prepare(path):
    """Write PyTorch's output, cotangent, gradients and losses of every case, from the weights of one rank."""
    import torch
    from mpi4py import MPI

    from colossal_mpi import Grid
    from colossal_mpi.layers import Parallelism
    from tests.cases import host

    grid = Grid(MPI.COMM_SELF)
    for case, options in CASES.items():
        layer = make(Parallelism(grid), case)
        w = {q.name: torch.tensor(host(q.value), requires_grad=True) for q in layer.parameters()}
        x = torch.tensor(X, requires_grad=True)
        mask = torch.tensor(MASK if case in MASKED else np.ones_like(MASK))
        y, losses = mixture(x, w, mask, **options)
        total = (y * torch.tensor(DY)).sum() + SHARE * sum(losses.values())
        total.backward()
        exact = {"y": y.detach(), "dx": x.grad, **{name: v.grad for name, v in w.items()}}
        exact |= {f"loss/moe.{name}": SHARE * loss.detach() for name, loss in losses.items()}
        np.savez(path / f"{case}.npz", **{name: v.numpy() for name, v in exact.items()})


def mixture(
    x,
    w,
    mask,
    experts,
    top_k,
    activation="swiglu",
    renormalise=None,
    balance=0.0,
    balance_over="sequence",
    z_loss=0.0,
    bias=False,
):
    """Return the output and the losses, expert by expert."""
    import torch

    logits = x @ w["moe.router.weight"]
    probabilities = logits.softmax(-1)
    weights, chosen = probabilities.topk(top_k, dim=-1)
    if top_k > 1 if renormalise is None else renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e in range(experts):
        b, s, place = (chosen == e).nonzero(as_tuple=True)
        taken = torch.einsum("nh,h...f->n...f", x[b, s], w["moe.up.weight"][e])
        taken = taken + (w["moe.up.bias"][e] if bias else 0)
        taken = activate(taken, activation) @ w["moe.down.weight"][e]
        taken = taken + (w["moe.down.bias"][e] if bias else 0)
        y = y.index_put((b, s), taken * weights[b, s, place, None], accumulate=True)
    if not balance and not z_loss:
        return y, {}
    hits = torch.nn.functional.one_hot(chosen, experts).sum(-2).double()
    squares = logits.logsumexp(-1) ** 2

    def product_of_means(*index):
        return (hits[index].mean(0) * probabilities[index].mean(0)).sum()

    filled = [i for i in range(len(x)) if mask[i].any()]  # a sequence of padding adds 0 to both losses
    z = sum(squares[i, mask[i]].mean() for i in filled) / len(x)
    over = sum(product_of_means(i, mask[i]) for i in filled) / len(x)
    if balance_over == "microbatch":
        over = product_of_means(mask)
    return y, {"balance": balance * experts * over, "z_loss": z_loss * z}


def activate(x, name):
    from torch.nn import functional

    plain = {
        "gelu-tanh": lambda z: functional.gelu(z, approximate="tanh"),
        "gelu": functional.gelu,
        "silu": functional.silu,
    }
    gates = {"swiglu": "silu", "geglu": "gelu"}
    if name in gates:
        return plain[gates[name]](x[:, 0]) * x[:, 1]
    return plain[name](x)
