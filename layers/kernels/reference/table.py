"""Look-ups of a table's rows by number, and sums of the cotangents of equal rows, called by the embeddings."""

from __future__ import annotations

from colossal_mpi.errors import ShapeError
from colossal_mpi.layers.kernels.reference.wide import wide
from colossal_mpi.platform.backend import Block, namespace

STRETCH = 128
"""Number of ids whose rows one product adds."""


def lookup(table: Block, ids: Block, start: int) -> Block:
    """Return rows of a part of a table: row ``ids - start`` if the part has it, zeros otherwise.

    Parameters
    ----------
    table : array
        Rows ``[rows, h]`` of the part, the global rows ``start`` to ``start + rows``.
    ids : array
        Integer global row numbers of any shape.
    start : int
        Global number of the first row of the part.

    Returns
    -------
    array
        Rows ``[*ids.shape, h]`` in the dtype of `table`.
    """
    xp = namespace(table)
    flat, here = _rows(ids, start, table.shape[0])
    if not table.shape[0]:
        return xp.zeros((*ids.shape, table.shape[1]), dtype=table.dtype)
    rows = xp.take(table, flat, axis=0)
    rows *= xp.astype(here, table.dtype)[:, None]
    return xp.reshape(rows, (*ids.shape, table.shape[1]))


def _rows(ids: Block, start: int, count: int) -> tuple[Block, Block]:
    """Return flat row numbers in a part of a table, 0 for rows that it lacks, and whether it has them."""
    xp = namespace(ids)
    local = xp.reshape(ids, (-1,)) - start
    here = (local >= 0) & (local < count)
    return xp.where(here, local, xp.zeros_like(local)), here


def lookup_backward(dy: Block, ids: Block, start: int, count: int) -> Block:
    """Return the cotangent of the table of `lookup`. Equal rows are added in a fixed order.

    Parameters
    ----------
    dy : array
        Cotangent ``[*ids.shape, h]`` of the rows.
    ids : array
        Integer global row numbers.
    start : int
        Global number of the first row of the part.
    count : int
        Number of rows of the part.

    Returns
    -------
    array
        Cotangent ``[count, h]`` of the part, in float32 if `dy` is of 16 bits.
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
    """Return the distinct ids, sorted, and for each the weighted sum of its rows of `dy`.

    Ids are sorted and taken `STRETCH` at a time. One product with a matrix of weights and zeros sums a stretch; one
    product for all ids would cost the square of their number. A sum is continued if its id goes on in the next stretch.
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
    """Require that integer ids are in a range.

    Parameters
    ----------
    ids : array
        Integer ids of any shape.
    count : int
        Ids must be below it.
    least : int, optional
        Least id that is allowed; None allows any negative id.

    Raises
    ------
    ShapeError
        On the ranks that hold an id outside the range, which ends the job.
    """
    xp = namespace(ids)
    if not ids.size:
        return
    low, high = int(xp.min(ids)), int(xp.max(ids))
    if high >= count or (least is not None and low < least):
        raise ShapeError(f"token ids from {low} to {high} for a vocabulary of {count}: they must be below it, from 0")
