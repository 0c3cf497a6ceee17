"""Top-k routing of tokens to experts, and the slots in which the experts take them, called by `MoE`.

An assignment is one token's choice of one of its k experts; assignment i belongs to token ``i // k``. Each assignment
has one slot, and each slot has one assignment or none, so that gathering from one into the other is its own adjoint.
"""

from __future__ import annotations

from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.platform.backend import Block, namespace


def route(logits: Block, k: int, renormalise: bool) -> tuple[Block, Block, Block, Block]:
    """Return the k experts of each token and their weights.

    Parameters
    ----------
    logits : array
        Logits ``[n, e]`` of n tokens for e experts.
    k : int
        Number of experts of a token.
    renormalise : bool
        Whether the k weights, which are softmax probabilities, are divided by their sum.

    Returns
    -------
    chosen : array
        Integer experts ``[n, k]`` in order of falling logits; of equal logits the lower expert first.
    weights : array
        Weights ``[n, k]``, in float32 if `logits` are of 16 bits, as the other results.
    probabilities : array
        Softmax ``[n, e]`` of the logits.
    log : array
        Logarithm ``[n]`` of the sum of ``exp(logits)``.

    References
    ----------
    Shazeer et al.: Outrageously large neural networks, 2017.
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
    dweights : array
        Cotangent ``[n, k]`` of the weights.
    chosen : array
        Experts ``[n, k]`` that `route` returned.
    weights : array
        Weights ``[n, k]`` that `route` returned.
    probabilities : array
        Softmax ``[n, e]`` that `route` returned.
    renormalise : bool
        As `route` takes it.
    pull : array, optional
        Further cotangent ``[n, e]`` of the probabilities, from the balancing loss.
    push : array, optional
        Cotangent ``[n]`` of the logarithms, from the z-loss.

    Returns
    -------
    array
        Cotangent ``[n, e]``.
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


def routing_sums(chosen: Block, probabilities: Block, log: Block, valid: Block | None, shape: tuple[int, int]) -> Block:
    """Return the sums over the tokens of each sequence that the balancing loss and the z-loss need.

    Parameters
    ----------
    chosen : array
        Experts ``[n, k]`` that `route` returned.
    probabilities : array
        Softmax ``[n, e]`` that `route` returned.
    log : array
        Logarithms ``[n]`` that `route` returned.
    valid : array, optional
        Bool ``[n]``: the tokens that count. None: all do.
    shape : (int, int)
        The number b of sequences and the number s of tokens of each; the n = b s tokens are in this order.

    Returns
    -------
    array
        Sums ``[b, 2 e + 2]`` in float64: assignments of each expert, its probabilities, the number of tokens, and the
        squares of the logarithms.
    """
    xp = namespace(log)
    n, e = probabilities.shape
    count = xp.ones((n,), dtype=xp.float64) if valid is None else xp.astype(valid, xp.float64)
    hits = xp.astype(chosen[:, :, None] == xp.arange(e), xp.float64)
    assigned = xp.sum(hits, axis=1) * count[:, None]
    mass = xp.astype(probabilities, xp.float64) * count[:, None]
    squares = xp.astype(log, xp.float64) ** 2 * count
    terms = xp.concat([assigned, mass, xp.stack([count, squares], axis=1)], axis=1)
    return xp.sum(xp.reshape(terms, (*shape, 2 * e + 2)), axis=1)


def sort_by_expert(chosen: Block, experts: int) -> tuple[Block, Block]:
    """Return the assignments in order of their experts, and the index at which each expert begins.

    Parameters
    ----------
    chosen : array
        Experts ``[n, k]`` that `route` returned.
    experts : int
        Number e of experts.

    Returns
    -------
    order : array
        Assignments ``[n k]``, ordered by expert and then by token.
    starts : array
        Index in `order` at which each expert begins, ``[e + 1]``.
    """
    xp = namespace(chosen)
    flat = xp.reshape(chosen, (-1,))
    order = xp.argsort(flat, stable=True)
    return order, xp.searchsorted(xp.take(flat, order), xp.arange(experts + 1, dtype=flat.dtype))


def match_slots(chosen: Block, order: Block, starts: Block, capacity: int) -> tuple[Block, Block]:
    """Return the assignment of each slot and the slot of each assignment.

    Parameters
    ----------
    chosen : array
        Experts ``[n, k]`` that `route` returned.
    order : array
        Assignments by expert that `sort_by_expert` returned.
    starts : array
        Beginnings that `sort_by_expert` returned.
    capacity : int
        Slots of each expert, no fewer than any expert has assignments.

    Returns
    -------
    source : array
        Assignment of each slot, ``[e capacity]``, -1 if the slot is empty.
    slots : array
        Slot of each assignment, ``[n k]``.
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
    """Return the rows of tokens in their slots, times the weights of the assignments.

    Parameters
    ----------
    rows : array
        Rows ``[n, h]`` of the tokens.
    source : array
        Assignment of each slot, as `match_slots` returns it.
    k : int
        Number of experts of a token.
    weights : array, optional
        Weights ``[n, k]`` of the assignments. By default all are 1.

    Returns
    -------
    array
        Rows ``[slots, h]``, zeros in empty slots. **Adjoint:** `take_slots`, whose k rows of a token are added.
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
    """Return the rows of assignments from their slots.

    Parameters
    ----------
    slots : array
        Rows ``[slots, h]``.
    places : array
        Slot of each assignment, as `match_slots` returns it.
    k : int
        Number of experts of a token.

    Returns
    -------
    array
        Rows ``[k, n, h]``: for each token one row from each of its experts. **Adjoint:** `fill_slots`.
    """
    xp = namespace(slots)
    by_place = xp.matrix_transpose(xp.reshape(places, (-1, k)))
    if not places.shape[0]:
        return xp.zeros((*by_place.shape, slots.shape[1]), dtype=slots.dtype)
    return xp.reshape(xp.take(slots, xp.reshape(by_place, (-1,)), axis=0), (*by_place.shape, slots.shape[1]))
