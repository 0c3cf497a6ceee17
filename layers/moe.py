"""Mixture of experts: each token goes through the MLPs of a few experts, which are cut over the data axis.

Each rank sorts the tokens that it holds into slots ``[e, p, c, h]``: p counts the blocks of tokens, one to a rank, c
the slots of an expert in a block. To the experts, e cut over ``data`` instead of p, is one redistribution and back is
another: all_to_alls, each the adjoint of the other. In between stands an ordinary `MLP` over a batch letter e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.kernels import like, wide
from colossal_mpi.layers.layer import Context, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.mlp import MLP
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layers.positions import given_mask
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


@dataclass(frozen=True)
class Routing:
    """Where the tokens that a rank holds go; the same on all ranks that hold them."""

    chosen: Block
    weights: Block
    probabilities: Block
    source: Block
    """The assignment of each slot."""
    slots: Block
    """The slot of each assignment."""
    pull: Block | None
    """Cotangent of the probabilities, that of the balancing loss."""
    push: Block | None
    """Cotangent of the logarithms of the sums of ``exp(logits)``, that of the z-loss."""


class MoE(Layer):
    """A mixture-of-experts feed-forward layer of the residual stream ``[b, s, h]``.

    A router, one product to a logit for each expert, sends each token to its `top_k` experts; what they return is added
    with the softmax probabilities as weights. No token is dropped, whatever the router does, and padding is routed as
    any token. Equal logits go to the lower expert. Choices are discrete: logits that are equal but for rounding may be
    ordered differently on another grid.

    Parameters
    ----------
    hidden, inner, experts : int
        Width of the stream, width of each expert's MLP, number of experts: any numbers, on any grid.
    parallelism : Parallelism
    name : str
        Prefix of the names of the parameters ``router.weight`` ``[h, e]``, ``up.weight`` ``[e, h, f]`` and
        ``down.weight`` ``[e, f, h]``.
    activation : str
        As `MLP` takes it.
    top_k : int
        Experts of a token: 2 in Mixtral, 1 in Switch.
    renormalise : bool, optional
        Whether the weights of a token's experts are made to add up to 1. By default they are if there are several: a
        single one would be 1 and teach the router nothing.
    balance : float
        Coefficient of the load-balancing loss ``e sum_i(f_i p_i)``: f_i the assignments of expert i per token, p_i its
        mean probability, over all tokens but padding on all ranks. It is `top_k` at perfect balance.
    z_loss : float
        Coefficient of the mean of ``log(sum exp(logits))^2`` over the same tokens.
    bias : bool
        Whether the experts' products have biases.
    std, out_std : float
        Standard deviations of the initial weights of the router and the products up, and of the products down.
    seed, dtype

    Raises
    ------
    OptionError
        If `top_k` is not from 1 to `experts` or a coefficient is negative.

    Notes
    -----
    `backward` adds the gradients of the two losses, times `Context.share`; `forward` reports their values to
    `Context.losses`.

    All experts have as many slots in all blocks as the fullest of them needs, up to an eighth more: no token is
    dropped, and the better the balance the fewer the words. With N slots in all:

    **Communication**, summed over ranks: that of an `MLP` of N tokens whose weights are not replicated over ``data``,
    and ``N h (1 - 1/d)`` words each way between its d ranks, forward and backward. The router's logits ``[b, s, e]``
    are reduced over the axes that cut h, in the backward pass the cotangents of the weights ``[b, s, k]``, too; one
    word and, with losses, ``2 e + 2`` are reduced over the blocks of tokens. Gradients of experts cross no ``data``.

    References
    ----------
    Shazeer et al.: Outrageously large neural networks, 2017. Lepikhin et al.: GShard, 2020. Fedus, Zoph, Shazeer:
    Switch transformers, 2021 (balancing). Zoph et al.: ST-MoE, 2022 (z-loss). Jiang et al.: Mixtral of experts, 2024.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        parallelism: Parallelism,
        name: str,
        *,
        activation: str = "swiglu",
        top_k: int = 2,
        renormalise: bool | None = None,
        balance: float = 0.0,
        z_loss: float = 0.0,
        bias: bool = False,
        std: float = 0.02,
        out_std: float = 0.02,
        seed: int = 0,
        dtype: Any = "float32",
    ) -> None:
        if not 1 <= top_k <= experts or min(balance, z_loss) < 0:
            raise OptionError(
                f"{name}: top_k={top_k} of {experts} experts, balance={balance}, z_loss={z_loss}: top_k must be from "
                "1 to the number of experts, the coefficients 0 or more"
            )
        self.name, self.top_k, self.balance, self.z_loss = name, top_k, balance, z_loss
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        common, inside = {"std": std, "seed": seed, "dtype": dtype}, parallelism.experts()
        sizes = {"h": hidden, "e": experts}
        self.router = Linear("bsh,he->bse", sizes, None, parallelism, f"{name}.router", bias=False, **common)
        common |= {"activation": activation, "bias": bias, "out_std": out_std}
        self.experts = MLP(hidden, inner, inside, name, experts=experts, **common)
        self.stream, self.slots = parallelism.stream(), inside.stream("epch")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Any]:
        """Return the weighted sum of what its experts make of each token, in the layout of the stream.

        Raises
        ------
        ShapeError
            If the context's mask is not ``[b, s]``.
        DTypeError
            If it is not bool.
        """
        layout, x = x.layout.with_partial(), x.redistribute(self.stream)
        logits, kept = self.router.forward(x, ctx)
        routing = self._route(logits, ctx)
        y, inside = self.experts.forward(self._in_slots(x, routing), ctx)
        rows = kernels.of(y.grid).take_slots(_flat(y), routing.slots, self.top_k)
        mixed = sum(routing.weights[:, j, None] * rows[j, ...] for j in range(self.top_k))
        return _like(x, mixed), (layout, x, kept, routing, inside, rows)

    def backward(self, dy: DistArray, cache: Any, later: Later = None) -> DistArray:
        """Return the cotangent of x; those of router and experts go to the gradients."""
        layout, x, kept, routing, inside, rows = cache
        dy = dy.redistribute(self.stream)
        dx = self.experts.backward(self._in_slots(dy, routing, routing.weights), inside, later)
        back = kernels.of(dx.grid).take_slots(_flat(dx), routing.slots, self.top_k)
        through = _like(x, sum(back[j, ...] for j in range(self.top_k)))
        return (through + self.router.backward(self._dlogits(dy, routing, rows), kept, later)).redistribute(layout)

    def _in_slots(self, x: DistArray, routing: Routing, weights: Block | None = None) -> DistArray:
        """Return the tokens of all ranks in their slots ``[e, p, c, h]``. **Communication:** none."""
        e, grid = routing.probabilities.shape[1], x.grid
        block = like(x.local, kernels.of(grid).fill_slots(_flat(x), routing.source, self.top_k, weights))
        capacity, p = block.shape[0] // e, grid.extent(self.slots.dims[1])
        block = backend.namespace(block).reshape(block, (e, 1, capacity, block.shape[1]))
        return DistArray(block, (e, p, capacity, x.shape[-1]), self.slots, grid)

    def _route(self, logits: DistArray, ctx: Context) -> Routing:
        local = kernels.of(logits.grid)
        chosen, weights, probabilities, log = local.route(_flat(logits), self.top_k, self.renormalise)
        order, starts = local.sort_by_expert(chosen, logits.shape[-1])
        source, slots = local.match_slots(chosen, order, starts, self._capacity(starts, logits))
        pull = push = None
        if self.balance or self.z_loss:
            pull, push = self._losses(logits, chosen, probabilities, log, ctx)
        return Routing(chosen, weights, probabilities, source, slots, pull, push)

    def _capacity(self, starts: Block, logits: DistArray) -> int:
        """Return the most assignments of an expert in a block of tokens, rounded up by an eighth at most.

        Every capacity has its own plans of redistributions, which are kept: the rounding bounds their number.
        """
        if logits.grid.is_meta:  # nothing is routed: all experts have as many
            rows = math.prod(logits.local.shape[:-1])
            return -(-rows * self.top_k // logits.shape[-1])
        xp = backend.namespace(starts)
        most = xp.reshape(xp.max(starts[1:] - starts[:-1]), (1,))
        most = int(backend.to_host(comm.allreduce(most, logits.grid, logits.layout.cut, comm.MAX))[0])
        step = 1 << max(0, most.bit_length() - 4)
        return -(-most // step) * step

    def _losses(
        self, logits: DistArray, chosen: Block, probabilities: Block, log: Block, ctx: Context
    ) -> tuple[Block, Block]:
        """Report the two losses; return the cotangents of the probabilities and of the logarithms of the sums."""
        xp, e = backend.namespace(log), logits.shape[-1]
        mask = given_mask(ctx, logits)
        valid = None if mask is None else xp.reshape(mask, (-1,))
        sums = kernels.of(logits.grid).routing_sums(chosen, probabilities, log, valid)
        sums = comm.allreduce(sums, logits.grid, logits.layout.cut)
        assigned, mass, (count, squares) = sums[:e], sums[e : 2 * e], backend.to_host(sums[2 * e :])
        count = max(float(count), 1.0)
        if ctx.losses is not None:
            balance = e * float(backend.to_host(xp.sum(assigned * mass))) / count**2
            ctx.losses[f"{self.name}.balance"] = ctx.share * self.balance * balance
            ctx.losses[f"{self.name}.z_loss"] = ctx.share * self.z_loss * float(squares) / count
        share = ctx.share * ctx.scale
        pull = xp.astype(share * self.balance * e / count**2 * assigned, log.dtype)
        pull, push = xp.broadcast_to(pull, probabilities.shape), 2 * share * self.z_loss / count * log
        if valid is not None:
            factor = xp.astype(valid, log.dtype)
            pull, push = pull * factor[:, None], push * factor
        return pull, push

    def _dlogits(self, dy: DistArray, routing: Routing, rows: Block) -> DistArray:
        """Return the cotangent of the logits. **Communication:** ``[b, s, k]`` is summed over the axes that cut h."""
        xp = backend.namespace(rows)
        d, rows = wide(_flat(dy)), wide(rows)
        dweights = xp.stack([xp.sum(d * rows[j, ...], axis=-1) for j in range(self.top_k)], axis=-1)
        dweights = comm.allreduce(dweights, dy.grid, dy.layout.dims[-1])
        block = kernels.of(dy.grid).route_backward(
            dweights,
            routing.chosen,
            routing.weights,
            routing.probabilities,
            self.renormalise,
            routing.pull,
            routing.push,
        )
        e = block.shape[1]
        block = like(dy.local, xp.reshape(block, (*dy.local.shape[:2], e)))
        return DistArray(block, (*dy.shape[:2], e), Layout(*dy.layout.dims[:2], None), dy.grid)


def _flat(x: DistArray) -> Block:
    """Return a block as rows of its last dim."""
    rows = 1
    for n in x.local.shape[:-1]:
        rows *= n
    return backend.namespace(x.local).reshape(x.local, (rows, x.local.shape[-1]))


def _like(x: DistArray, rows: Any) -> DistArray:
    return x.like(like(x.local, backend.namespace(rows).reshape(rows, x.local.shape)))
