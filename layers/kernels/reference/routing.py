"""Top-k routing of tokens to experts, and the slots in which the experts take them.

An assignment is one of the k places of a token at experts; assignment i is that of token ``i // k``. Slots and
assignments are matched one to one but for empty slots, so that gathering from one into the other is its own adjoint.
"""

from __future__ import annotations

from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.platform.backend import Block, namespace


def route(logits: Block, k: int, renormalise: bool) -> tuple[Block, Block, Block, Block]:
    """Return the k experts of each token and their weights.

    Parameters
    ----------
    logits : array, ``[n, e]``
    k : int
    renormalise : bool
        Whether the k weights, which are softmax probabilities, are divided by their sum.

    Returns
    -------
    chosen : integer array, ``[n, k]``
        By falling logit, of equal ones the lower expert first.
    weights : array, ``[n, k]``
    probabilities : array, ``[n, e]``
    log : array, ``[n]``
        The logarithm of the sum of ``exp(logits)``. Like weights and probabilities in float32 where logits are of 16
        bits.
    """
    xp, logits = namespace(logits), wide(logits)
    chosen = xp.argsort(-logits, axis=-1, stable=True)[:, :k]
    top = xp.max(logits, axis=-1, keepdims=True)
    probabilities = xp.exp(logits - top)
    total = xp.sum(probabilities, axis=-1, keepdims=True)
    probabilities /= total
    weights = xp.take_along_axis(probabilities, chosen, axis=-1)
    if renormalise:
        weights /= xp.sum(weights, axis=-1, keepdims=True)
    return chosen, weights, probabilities, (top + xp.log(total))[:, 0]


def route_backward(
    dweights: Block,
    chosen: Block,
    weights: Block,
    probabilities: Block,
    renormalise: bool,
    pull: Block | None = None,
    push: Block | None = None,
) -> Block:
    """Return the cotangent of the logits of `route`.

    Parameters
    ----------
    dweights, chosen, weights, probabilities
        The cotangent and the results of `route`.
    renormalise : bool
    pull : array, ``[n, e]``, optional
        A further cotangent of the probabilities.
    push : array, ``[n]``, optional
        A cotangent of the logarithms.
    """
    xp = namespace(weights)
    d = dweights
    if renormalise:
        d = d - xp.sum(d * weights, axis=-1, keepdims=True)
        d /= xp.sum(xp.take_along_axis(probabilities, chosen, axis=-1), axis=-1, keepdims=True)
    dp = xp.zeros_like(probabilities) if pull is None else pull
    experts = xp.arange(probabilities.shape[1])
    for j in range(chosen.shape[1]):
        dp = dp + xp.where(chosen[:, j, None] == experts, d[:, j, None], xp.zeros_like(dp))
    dp -= xp.sum(dp * probabilities, axis=-1, keepdims=True)
    if push is not None:
        dp += push[:, None]
    dp *= probabilities
    return dp


def routing_sums(chosen: Block, probabilities: Block, log: Block, valid: Block | None) -> Block:
    """Return ``[2 e + 2]`` sums over tokens in float64: assignments of each expert, its probabilities, tokens, log^2.

    Parameters
    ----------
    chosen, probabilities, log
        The results of `route`.
    valid : bool array, ``[n]``, optional
        The tokens that count.
    """
    xp = namespace(log)
    n, e = probabilities.shape
    count = xp.ones((n,), dtype=xp.float64) if valid is None else xp.astype(valid, xp.float64)
    hits = xp.astype(chosen[:, :, None] == xp.arange(e), xp.float64)
    assigned = xp.sum(xp.sum(hits, axis=1) * count[:, None], axis=0)
    mass = xp.sum(xp.astype(probabilities, xp.float64) * count[:, None], axis=0)
    squares = xp.sum(xp.astype(log, xp.float64) ** 2 * count)
    return xp.concat([assigned, mass, xp.stack([xp.sum(count), squares])])


def sort_by_expert(chosen: Block, experts: int) -> tuple[Block, Block]:
    """Return the assignments by expert, in order of the tokens, and where those of each expert begin, ``[e + 1]``."""
    xp = namespace(chosen)
    flat = xp.reshape(chosen, (-1,))
    order = xp.argsort(flat, stable=True)
    return order, xp.searchsorted(xp.take(flat, order), xp.arange(experts + 1, dtype=flat.dtype))


def match_slots(chosen: Block, order: Block, starts: Block, capacity: int) -> tuple[Block, Block]:
    """Return the assignment of each slot, ``[e capacity]``, -1 where it is empty, and the slot of each assignment.

    Parameters
    ----------
    chosen : integer array, ``[n, k]``
    order, starts
        The results of `sort_by_expert`.
    capacity : int
        Slots of each expert, no fewer than any has assignments.
    """
    xp, flat = namespace(chosen), namespace(chosen).reshape(chosen, (-1,))
    slots = xp.astype(xp.argsort(order), starts.dtype) - xp.take(starts, flat) + flat * capacity
    experts = starts.shape[0] - 1
    place = starts[:-1, None] + xp.arange(capacity, dtype=starts.dtype)[None, :]
    filled = xp.reshape(place < starts[1:, None], (experts * capacity,))
    place = xp.reshape(place, (experts * capacity,))
    if not flat.shape[0]:
        return xp.zeros_like(place) - 1, slots
    held = xp.take(order, xp.where(filled, place, xp.zeros_like(place)))
    return xp.where(filled, held, -xp.ones_like(held)), slots


def fill_slots(rows: Block, source: Block, k: int, weights: Block | None = None) -> Block:
    """Return the rows ``[n, h]`` of tokens in their slots, ``[len(source), h]``, times their weights; 0 in empty slots.

    Parameters
    ----------
    rows : array, ``[n, h]``
    source : integer array
        The assignment of each slot, as `match_slots` gives it.
    k : int
    weights : array, ``[n, k]``, optional
        Of the assignments.
    """
    xp = namespace(rows)
    if not rows.shape[0]:
        return xp.zeros((source.shape[0], rows.shape[1]), dtype=rows.dtype)
    filled = source >= 0
    held = xp.where(filled, source, xp.zeros_like(source))
    factor = xp.astype(filled, rows.dtype)
    if weights is not None:
        factor *= xp.take(xp.reshape(weights, (-1,)), held)
    out = xp.take(rows, held // k, axis=0)
    out *= factor[:, None]
    return out


def take_slots(slots: Block, places: Block, k: int) -> Block:
    """Return the rows ``[k, n, h]`` of assignments from the slots ``[slots, h]`` that `match_slots` gave them."""
    xp = namespace(slots)
    by_place = xp.matrix_transpose(xp.reshape(places, (-1, k)))
    if not places.shape[0]:
        return xp.zeros((*by_place.shape, slots.shape[1]), dtype=slots.dtype)
    return xp.reshape(xp.take(slots, xp.reshape(by_place, (-1,)), axis=0), (*by_place.shape, slots.shape[1]))
