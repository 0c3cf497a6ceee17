"""Rows of a table by their numbers."""

from __future__ import annotations

from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.platform.backend import Block, namespace

STRETCH = 128
"""Ids whose rows are added by one product."""


def lookup(table: Block, ids: Block, start: int) -> Block:
    """Return rows of a piece of a table: row ``ids - start`` where the piece has it, zeros elsewhere.

    Parameters
    ----------
    table : array, ``[rows, h]``
        Global rows ``start`` to ``start + rows``.
    ids : integer array, ``[...]``
        Global row numbers.
    """
    xp = namespace(table)
    flat, here = _rows(ids, start, table.shape[0])
    if not table.shape[0]:
        return xp.zeros((*ids.shape, table.shape[1]), dtype=table.dtype)
    rows = xp.take(table, flat, axis=0)
    rows *= xp.astype(here, table.dtype)[:, None]
    return xp.reshape(rows, (*ids.shape, table.shape[1]))


def _rows(ids: Block, start: int, count: int) -> tuple[Block, Block]:
    """Return flat row numbers inside a piece of a table, 0 where it has not the row, and where it has it."""
    xp = namespace(ids)
    local = xp.reshape(ids, (-1,)) - start
    here = (local >= 0) & (local < count)
    return xp.where(here, local, xp.zeros_like(local)), here


def lookup_backward(dy: Block, ids: Block, start: int, count: int) -> Block:
    """Return the cotangent ``[count, h]`` of the table of `lookup`. Equal rows are added in a fixed order.

    That of 16-bit floats is float32.
    """
    dy = wide(dy)
    xp, h = namespace(dy), dy.shape[-1]
    flat, here = _rows(ids, start, count)
    if not flat.size or not count:
        return xp.zeros((count, h), dtype=dy.dtype)
    distinct, sums = _sum_equal(flat, xp.reshape(dy, (flat.shape[0], h)), xp.astype(here, dy.dtype))
    rows = xp.arange(count)
    nearest = xp.clip(xp.searchsorted(distinct, rows), max=distinct.shape[0] - 1)
    table = xp.take(sums, nearest, axis=0)
    table *= xp.astype(xp.take(distinct, nearest) == rows, dy.dtype)[:, None]
    return table


def _sum_equal(ids: Block, dy: Block, weights: Block) -> tuple[Block, Block]:
    """Return the distinct `ids`, sorted, and for each the weighted sum of its rows of `dy`.

    Ids are sorted and taken `STRETCH` at a time, each stretch by one product with a matrix of weights and zeros: one
    product for all would cost the square of their number. An id that goes on in the next stretch is added there.
    """
    xp, order = namespace(dy), namespace(ids).argsort(ids)
    ids, found, sums = xp.take(ids, order), list[Block](), list[Block]()
    for low in range(0, ids.shape[0], STRETCH):
        high = min(low + STRETCH, ids.shape[0])
        some = order[low:high]
        distinct, place = xp.unique_inverse(ids[low:high])
        hits = xp.reshape(place, (1, -1)) == xp.arange(distinct.shape[0])[:, None]
        total = xp.matmul(xp.astype(hits, dy.dtype) * xp.take(weights, some), xp.take(dy, some, axis=0))
        if found and found[-1][-1] == distinct[0]:
            total[0, :] += sums[-1][-1, :]
            found[-1], sums[-1] = found[-1][:-1], sums[-1][:-1, :]
        found.append(distinct)
        sums.append(total)
    return xp.concat(found), xp.concat(sums)


def require_ids(ids: Block, count: int, least: int | None = 0) -> None:
    """Require integer ids from `least` (None: any) to below `count`.

    Raises
    ------
    ShapeError
        On the ranks that hold an id outside, which ends the job.
    """
    xp = namespace(ids)
    if not ids.size:
        return
    low, high = int(xp.min(ids)), int(xp.max(ids))
    if high >= count or (least is not None and low < least):
        raise ShapeError(f"token ids from {low} to {high} for a vocabulary of {count}: they must be below it, from 0")
