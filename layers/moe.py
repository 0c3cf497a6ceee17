"""Mixture of experts: a router sends each token through the MLPs of a few experts, which the data axis cuts.

A transformer block builds `MoE` in place of its MLP. Each rank sorts its tokens into slots ``[e, p, c, h]``, where p
counts the blocks of tokens, one for each rank, and c the slots of an expert in a block. One redistribution brings the
slots to the experts, with e cut over ``data`` instead of p, and another brings them back: both are all_to_alls, and
each is the adjoint of the other. Between them stands an ordinary `MLP` with the batch letter e. The sorting is local:
it calls the routing kernels of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import DTypeLike

from colossal_mpi import comm
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import OptionError
from colossal_mpi.layers import kernels
from colossal_mpi.layers.context import Context
from colossal_mpi.layers.kernels import like, wide
from colossal_mpi.layers.layer import Cache, Later, Layer
from colossal_mpi.layers.linear import Linear
from colossal_mpi.layers.mlp import MLP
from colossal_mpi.layers.parallelism import Parallelism
from colossal_mpi.layout import Layout
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block


@dataclass(frozen=True)
class Routing:
    """The routing of a rank's tokens to experts, equal on all ranks that hold the same tokens.

    An *assignment* is one token's choice of one expert: token i makes the assignments i k to i k + k - 1.
    """

    chosen: Block
    """The experts of each token ``[n, k]``, integers."""
    weights: Block
    """The weights of these experts in the output ``[n, k]``."""
    probabilities: Block
    """The softmax of the router's logits ``[n, e]``."""
    source: Block
    """The assignment of each slot."""
    slots: Block
    """The slot of each assignment."""
    pull: Block | None
    """The cotangent ``[b, s, e]`` of the probabilities from the balancing loss."""
    push: Block | None
    """The cotangent ``[b, s]`` of ``log(sum exp(logits))`` from the z-loss."""


BALANCE_OVER = ("sequence", "microbatch")
"""The choices of the tokens over which the balancing loss of a mixture of experts is formed."""


class MoE(Layer):
    """A mixture-of-experts feed-forward layer of the residual stream ``[b, s, h]``.

    A router, one product to a logit for each expert, sends each token to its `top_k` experts; the output is the sum of
    their outputs with the softmax probabilities as weights. No token is dropped, however unbalanced the router is, and
    padding is routed like any token. Of equal logits the expert with the lower number wins. Choices are discrete:
    logits that differ by rounding only may be ordered differently on another grid.

    Parameters
    ----------
    hidden : int
        Width h of the stream.
    inner : int
        Width f of each expert's MLP.
    experts : int
        Number e of experts, any number on any grid.
    parallelism : Parallelism
        The mode, which chooses maps and layouts.
    name : str
        Prefix of the names of the parameters ``router.weight`` ``[h, e]``, ``up.weight`` ``[e, h, f]`` and
        ``down.weight`` ``[e, f, h]``.
    activation : str
        Activation of the experts, a name that `MLP` takes.
    top_k : int
        Experts of each token: 2 in Mixtral, 1 in Switch.
    renormalise : bool, optional
        Whether the weights of a token's experts are scaled to the sum 1. By default they are if there are several: a
        single weight would be 1 and teach the router nothing.
    balance : float
        Coefficient of the load-balancing loss ``e sum_i(f_i p_i)``, where f_i is the number of assignments to expert i
        per token and p_i its mean probability; padding does not count. The loss is `top_k` at perfect balance.
    balance_over : str
        The tokens over which f and p are means: ``"sequence"``, those of one sequence, and the loss is the mean over
        the sequences, whatever microbatches they are in; or ``"microbatch"``, those of all sequences that `forward` is
        given, on all ranks, and the loss then depends on how a step is cut into microbatches.
    z_loss : float
        Coefficient of the mean of ``log(sum exp(logits))^2``, over the tokens of a sequence but padding, and then over
        the sequences.
    bias : bool
        Whether the experts' products have biases.
    std : float
        Standard deviation of the initial weights of the router and of the experts' products up.
    out_std : float
        Standard deviation of the initial weights of the experts' products down.
    seed : int, optional
        Seed of the initial weights; None leaves them zero, for weights that are to be loaded.
    dtype : dtype
        Dtype of the parameters.

    Raises
    ------
    OptionError
        If `top_k` is not from 1 to `experts`, a coefficient is negative, or `balance_over` is neither choice.
    ShapeError
        From `forward`, if the mask of the context is not ``[b, s]``.
    DTypeError
        From `forward`, if this mask is not bool.

    Notes
    -----
    `backward` adds the gradients of the two losses, times ``Context.auxiliary.share``; `forward` reports their values
    to ``Context.auxiliary.values``.

    All experts have the same number of slots in all blocks: as many as the fullest one needs, rounded up by an eighth
    at most. The better the balance, the fewer the words.

    **Communication:** with N slots in all and d ranks along ``data``, summed over ranks: the words of an `MLP` of N
    tokens whose weights are not replicated over ``data``, and ``N h (1 - 1/d)`` words each way between the d ranks,
    forward and backward. Over the axes that cut h, the router's logits ``[b, s, e]`` are reduced forward and the
    cotangents of the weights ``[b, s, k]`` backward. One word is reduced over the blocks of tokens. With losses,
    ``2 e + 2`` words of each sequence are reduced over the axes that cut s; over the axes that cut b, ``e + 1`` words
    if the balance is over the microbatch, and two if the losses are reported. Gradients of experts do not cross
    ``data``.

    **Adjoint:** the cotangents take the way of the tokens in reverse, in the same slots.

    References
    ----------
    Shazeer et al.: Outrageously large neural networks, 2017. Lepikhin et al.: GShard, 2020. Fedus, Zoph, Shazeer:
    Switch transformers, 2021 (balancing). Zoph et al.: ST-MoE, 2022 (z-loss). Jiang et al.: Mixtral of experts, 2024.
    DeepSeek-AI: DeepSeek-V3 technical report, 2024 (balance in each sequence). Qiu et al.: Demons in the detail, 2025
    (balance in a microbatch and in a step).
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
        balance_over: str = "sequence",
        z_loss: float = 0.0,
        bias: bool = False,
        std: float = 0.02,
        out_std: float = 0.02,
        seed: int | None = 0,
        dtype: DTypeLike = "float32",
    ) -> None:
        if not 1 <= top_k <= experts or min(balance, z_loss) < 0:
            raise OptionError(
                f"{name}: top_k={top_k} of {experts} experts, balance={balance}, z_loss={z_loss}: top_k must be from "
                "1 to the number of experts, the coefficients 0 or more"
            )
        if balance_over not in BALANCE_OVER:
            raise OptionError(f"{name}: balance_over={balance_over!r} must be one of {', '.join(BALANCE_OVER)}")
        self.name, self.top_k, self.balance, self.z_loss = name, top_k, balance, z_loss
        self.balance_over = balance_over
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        common: dict[str, Any] = {"std": std, "seed": seed, "dtype": dtype}
        inside = parallelism.experts()
        sizes = {"h": hidden, "e": experts}
        self.router = Linear("bsh,he->bse", sizes, None, parallelism, f"{name}.router", bias=False, **common)
        common |= {"activation": activation, "bias": bias, "out_std": out_std}
        self.experts = MLP(hidden, inner, inside, name, experts=experts, **common)
        self.stream, self.slots = parallelism.stream(), inside.stream("epch")

    def forward(self, x: DistArray, ctx: Context) -> tuple[DistArray, Cache]:
        # X -> X[B, S, H_x], the layout of the stream
        layout, x = x.layout.with_partial(), x.redistribute(self.stream)
        # X[B, S, H_x] . router[H_x, E] -> logits[B, S, E] {U_x} -> logits[B, S, E], an allreduce over the axes x
        logits, router_cache = self.router.forward(x, ctx)
        routing = self._route(logits, ctx)
        # X[E, P_data, C, H] -> X[E_data, P, C, H], an all_to_all over data, is the first redistribution of the experts;
        # X[E_data, P, C, H] . up[E_data, H, F_col] . down[E_data, F_col, H] -> Y[E_data, P, C, H] -> Y[E, P_data, C, H]
        y, experts_cache = self.experts.forward(self._in_slots(x, routing), ctx)
        rows = kernels.of(y.grid).take_slots(_rows_of(y), routing.slots, self.top_k)
        # y[n] = sum over the token's k experts of weights[n, k] rows[k, n]
        mixed = sum(routing.weights[:, j, None] * rows[j, ...] for j in range(self.top_k))
        dtype = x.local.dtype
        y = x.like(_from_rows(mixed, x.local.shape, dtype))
        return y, (layout, dtype, router_cache, routing, experts_cache, rows)

    def backward(self, dy: DistArray, cache: Cache, later: Later = None) -> DistArray:
        layout, dtype, router_cache, routing, experts_cache, rows = cache
        # dY -> dY[B, S, H_x], the layout of the stream
        dy = dy.redistribute(self.stream)
        # weights[n, k] dY[n] -> dY[E, P_data, C, H] -> dY[E_data, P, C, H], an all_to_all over data;
        # the experts' backward pass makes dX[E_data, P, C, H] -> dX[E, P_data, C, H], the other all_to_all
        dx = self.experts.backward(self._in_slots(dy, routing, routing.weights), experts_cache, later)
        back = kernels.of(dx.grid).take_slots(_rows_of(dx), routing.slots, self.top_k)
        through = dy.like(_from_rows(sum(back[j, ...] for j in range(self.top_k)), dy.local.shape, dtype))
        dlogits = self._dlogits(dy, routing, rows)
        # dX through the experts + dX through the router -> dX in the layout of X
        return (through + self.router.backward(dlogits, router_cache, later)).redistribute(layout)

    def _in_slots(self, x: DistArray, routing: Routing, weights: Block | None = None) -> DistArray:
        """Return the tokens in their slots ``[e, p, c, h]``, times `weights` if given. **Communication:** none."""
        e, grid = routing.probabilities.shape[1], x.grid
        block = like(x.local, kernels.of(grid).fill_slots(_rows_of(x), routing.source, self.top_k, weights))
        capacity, p = block.shape[0] // e, grid.extent(self.slots.dims[1])
        block = backend.namespace(block).reshape(block, (e, 1, capacity, block.shape[1]))
        # each rank's own block of tokens: X[E, P_(..,data), C, H_x]
        return DistArray(block, (e, p, capacity, x.shape[-1]), self.slots, grid)

    def _route(self, logits: DistArray, ctx: Context) -> Routing:
        local = kernels.of(logits.grid)
        chosen, weights, probabilities, log = local.route(_rows_of(logits), self.top_k, self.renormalise)
        order, starts = local.sort_by_expert(chosen, logits.shape[-1])
        source, slots = local.match_slots(chosen, order, starts, self._capacity(starts, logits))
        pull = push = None
        if self.balance or self.z_loss:
            pull, push = self._losses(logits, chosen, probabilities, log, ctx)
        return Routing(chosen, weights, probabilities, source, slots, pull, push)

    def _capacity(self, starts: Block, logits: DistArray) -> int:
        """Return the slots of each expert in each block: the most assignments of any, rounded up by an eighth at most.

        Redistributions keep a plan for every capacity: the rounding bounds the number of plans.
        """
        if logits.grid.is_meta:  # meta arrays have no values to route by: assume perfect balance
            rows: int = math.prod(logits.local.shape[:-1])
            return -(-rows * self.top_k // logits.shape[-1])
        xp = backend.namespace(starts)
        most = xp.reshape(xp.max(starts[1:] - starts[:-1]), (1,))
        # the maximum over all blocks of tokens: one word, an allreduce (MAX) over the axes that cut b and s
        capacity = int(backend.to_host(comm.allreduce(most, logits.grid, logits.layout.cut, comm.MAX))[0])
        step: int = 1 << max(0, capacity.bit_length() - 4)
        rounded: int = -(-capacity // step) * step
        return rounded

    def _losses(
        self, logits: DistArray, chosen: Block, probabilities: Block, log: Block, ctx: Context
    ) -> tuple[Block, Block]:
        """Report the two losses, and return the cotangents of the probabilities and of ``log(sum exp(logits))``."""
        xp, grid, e = backend.namespace(log), logits.grid, logits.shape[-1]
        shape: tuple[int, int] = logits.local.shape[:2]
        over_b, over_s = logits.layout.dims[:2]
        mask, samples = ctx.mask_of(logits), max(logits.shape[0], 1)
        valid = None if mask is None else xp.reshape(mask, (-1,))
        sums = kernels.of(grid).routing_sums(chosen, probabilities, log, valid, shape)
        # assignments[B_x, E], probabilities[B_x, E], tokens[B_x], squares[B_x] {U_s}: an allreduce over the axes of s
        sums = comm.allreduce(sums, grid, over_s)
        mass, squares = sums[:, e : 2 * e], sums[:, 2 * e + 1]
        assigned, tokens, means = sums[:, :e], sums[:, 2 * e : 2 * e + 1], samples
        z = self.z_loss / (samples * xp.clip(tokens, min=1.0))
        if self.balance_over == "microbatch":
            both = xp.sum(xp.concat([assigned, tokens], axis=1), axis=0, keepdims=True)
            # assignments[1, E], tokens[1] {U_b}: an allreduce over the axes of b
            both = comm.allreduce(both, grid, over_b)
            assigned, tokens, means = both[:, :e], both[:, e:], 1
        # the loss is the sum over tokens and experts of pull[B, E] probabilities[B, S, E]; pull has no gradient
        pull = self.balance * e / means * assigned / xp.clip(tokens, min=1.0) ** 2
        share, values = ctx.auxiliary.share, ctx.auxiliary.values
        if values is not None:
            # losses[2] {U_b}: an allreduce over the axes of b
            losses = xp.stack([xp.sum(pull * mass), xp.sum(z[:, 0] * squares)])
            losses = backend.to_host(comm.allreduce(losses, grid, over_b))
            values[f"{self.name}.balance"], values[f"{self.name}.z_loss"] = (share * float(x) for x in losses)
        share *= ctx.scale
        pull = xp.broadcast_to(xp.astype(share * pull, log.dtype)[:, None, :], (*shape, e))
        push = 2 * xp.astype(share * z, log.dtype) * xp.reshape(log, shape)
        if mask is not None:
            factor = xp.astype(mask, log.dtype)
            pull, push = pull * factor[:, :, None], push * factor
        return pull, push

    def _dlogits(self, dy: DistArray, routing: Routing, rows: Block) -> DistArray:
        """Return the cotangent of the logits. **Communication:** ``[b, s, k]`` is summed over the axes that cut h."""
        xp = backend.namespace(rows)
        d, rows = wide(_rows_of(dy)), wide(rows)
        # dY[n, H_x] . rows[k, n, H_x] -> dweights[n, k] {U_x} -> dweights[n, k]: allreduce over the axes x that cut h
        dweights = xp.stack([xp.sum(d * rows[j, ...], axis=-1) for j in range(self.top_k)], axis=-1)
        dweights = comm.allreduce(dweights, dy.grid, dy.layout.dims[-1])
        n, e = routing.probabilities.shape
        block = kernels.of(dy.grid).route_backward(
            dweights,
            routing.chosen,
            routing.weights,
            routing.probabilities,
            self.renormalise,
            None if routing.pull is None else xp.reshape(routing.pull, (n, e)),
            None if routing.push is None else xp.reshape(routing.push, (n,)),
        )
        block = like(dy.local, xp.reshape(block, (*dy.local.shape[:2], e)))
        return DistArray(block, (*dy.shape[:2], e), Layout(*dy.layout.dims[:2], None), dy.grid)


def _rows_of(x: DistArray) -> Block:
    """Return a rank's block ``[..., n]`` as rows ``[tokens, n]``."""
    rows = math.prod(x.local.shape[:-1])
    return backend.namespace(x.local).reshape(x.local, (rows, x.local.shape[-1]))


def _from_rows(rows: Block, shape: tuple[int, ...], dtype: Any) -> Block:
    """Return rows ``[tokens, n]`` as a block of a shape ``[..., n]``, in a dtype."""
    xp = backend.namespace(rows)
    return xp.astype(xp.reshape(rows, shape), dtype, copy=False)
