"""Blocking collectives on blocks, and the one order in which the terms of a reduction are added.

With `colossal_mpi.comm.messages` this is the only module that gives buffers to MPI. `redistribution`, `linalg` and
`layers` call it; it calls `colossal_mpi.comm.staging`, which says how a block reaches MPI, and enters what arrived into
the ledger. Every function takes this rank's block and the grid axes that span the group, and checks that the block has
the size that the caller's plan gives this rank: MPI either accepts a mismatch silently or overwrites the heap.

**The order of sums.** A reduction adds its terms in the order of the ranks, ((0 + 1) + 2) + ..., whatever brings them:
small or large pieces, messages under way, or the memory of a neighbour. MPI's own reductions add in an order that
depends on the size and on the library, so none of them is used: the ranks exchange the pieces (`all_to_all`), which
receives the same ``(p - 1) own`` words as a reduce_scatter, and `add_in_rank_order` adds them. 16-bit floats are summed
in float32 and rounded once; small integers are summed in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, zip_longest
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from colossal_mpi import ledger
from colossal_mpi.comm.staging import arrived, landing, outgoing
from colossal_mpi.errors import ColossalError, DTypeError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

SUM, MAX = "sum", "max"
"""The reductions: the sum of the terms, and the greatest of them."""
T = TypeVar("T")


def mpi_type(dtype: Any) -> MPI.Datatype:
    """Return the MPI type of the elements of a buffer."""
    known = np.dtype(dtype)
    if not known.isnative:
        raise DTypeError(f"MPI cannot carry dtype {dtype}, of foreign byte order: from_global makes it native")
    if known.kind in "biufc":  # mpi4py has a code for strings too, and carries their first characters
        with suppress(KeyError, ValueError):
            return MPI.Datatype.fromcode(known.char)
    raise DTypeError(f"MPI cannot carry dtype {dtype}: use a float, complex, integer or bool dtype")


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts[:-1])] if counts else []


# Pieces from this many bytes on go from rank to rank by Sendrecv, which MPI copies once: on one node, MPICH's allgather
# takes twice as long. The words are the same.
_LARGE = 1 << 15
# A large reduction receives pieces of at most this many bytes from each rank, adds them, and goes on with the next.
_CHUNK = 1 << 20
# Elements of one message: MPI counts them, and where they lie in a buffer, in a C int, and Open MPI has nothing larger.
_LIMIT = (1 << 31) - 1
_TAG = 7


def _pairwise(counts: Sequence[int], buffer: Any) -> bool:
    """Say whether pieces of these counts, which all ranks of a group know, go rank by rank."""
    return max(counts) * buffer.dtype.itemsize >= _LARGE or sum(counts) > _LIMIT


def messages(piece: Any) -> list[Any]:
    """Return a flat piece as the messages that carry it; an empty one needs none."""
    return [piece[start : start + _LIMIT] for start in range(0, piece.size, _LIMIT)]


def _swap(comm: MPI.Intracomm, send: Any, to: int, recv: Any, source: int) -> None:
    """Send a flat piece to one rank while receiving one from another.

    Both ends of a message know its count and number it alike, and every rank takes its messages in the order of these
    numbers: the one with the lowest number can always go, so that none waits for ever.
    """
    kind = mpi_type(send.dtype)
    for out, into in zip_longest(messages(send), messages(recv)):
        comm.Sendrecv(
            None if out is None else [out, kind],
            MPI.PROC_NULL if out is None else to,
            _TAG,
            None if into is None else [into, kind],
            MPI.PROC_NULL if into is None else source,
            _TAG,
        )


def _shifts(comm: MPI.Intracomm) -> Iterator[tuple[int, int]]:
    """Yield, for each of p - 1 steps, the rank to send to and the one to receive from."""
    for step in range(1, comm.size):
        yield (comm.rank + step) % comm.size, (comm.rank - step) % comm.size


def _pieces(buffer: Any, starts: Sequence[int], counts: Sequence[int]) -> Callable[[int], Any]:
    return lambda rank: buffer[starts[rank] : starts[rank] + counts[rank]]


def _exchange_pairwise(comm: MPI.Intracomm, piece: Callable[[int], Any], place: Callable[[int], Any]) -> None:
    """Send each rank its piece and put what comes from it in its place; this rank's own is copied."""
    for to, source in _shifts(comm):
        _swap(comm, piece(to), to, place(source), source)
    place(comm.rank)[...] = piece(comm.rank)  # a kernel on a GPU: after the messages, which need an idle stream


def add_in_rank_order(terms: Sequence[Block], out: Block, op: str = SUM) -> Block:
    """Put the sum (or maximum) of the terms of all ranks of a group into `out`: ((0 + 1) + 2) + ...

    Every reduction of the package ends here, so that its bits do not depend on how the terms came.

    Parameters
    ----------
    terms : sequence of array
        The term of each rank, in the order of the ranks; all of one shape.
    out : array
        A block of this shape, of a dtype in which the terms are to be added. It shares no memory with the terms but
        the first.
    op : {"sum", "max"}
        The reduction.

    Returns
    -------
    array
        The block `out`.
    """
    out[...] = terms[0]
    for term in terms[1:]:
        if op == SUM:
            out += term
        else:
            out[...] = backend.namespace(out).maximum(out, term)
    return out


def _reduce_pairwise(comm: MPI.Intracomm, send: Any, counts: Sequence[int], op: str, total: Any, terms: Any) -> None:
    """Reduce large pieces into `total`: `terms` takes at most `_CHUNK` bytes of each rank's term at a time."""
    piece, me = _pieces(send, _starts(counts), counts), comm.rank
    width = _chunk(send)
    for low in range(0, max(counts), width):
        here = total[low : low + width]
        rows = [terms[r * here.size : (r + 1) * here.size] for r in range(comm.size)]
        rows[me] = piece(me)[low : low + width]
        for to, source in _shifts(comm):
            _swap(comm, piece(to)[low : low + width], to, rows[source], source)
        add_in_rank_order(rows, here, op)
        backend.synchronize(total)  # the next messages must not land before these terms are added


def _chunk(buffer: Any) -> int:
    return max(1, _CHUNK // buffer.dtype.itemsize)


def _require(count: int, block: Block, what: str) -> None:
    if block.size != count:
        raise ShapeError(f"{what}: the block has {block.size} elements and the plan needs {count}")


def require_reducible(op: str, block: Block) -> None:
    """Refuse the dtypes that have no such reduction."""
    kind = backend.numpy_dtype(block.dtype).kind
    if kind == "b" or (op == MAX and kind == "c"):
        raise DTypeError(f"the {op} of {block.dtype} over ranks: cast it first, bool to an integer, complex to a float")


def allgather(
    block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], starts: Sequence[int] | None = None
) -> Block:
    """Return the flat blocks of all ranks of the group, rank r's `counts[r]` elements at `starts[r]`.

    **Communication:** allgather, ``sum(counts) - own`` words received. **Adjoint:** `reduce_scatter`.
    """
    comm, begun = grid.comm(axes), ledger.clock.now()
    _require(counts[comm.rank], block, "allgather")
    send, recv = outgoing(block, grid), landing(block, sum(counts), grid)
    kind = mpi_type(send.dtype)
    starts = starts or _starts(counts)
    if _pairwise(counts, send):
        _exchange_pairwise(comm, lambda _: send, _pieces(recv, starts, counts))
    else:
        comm.Allgatherv([send, kind], [recv, (counts, starts), kind])
    words = sum(counts) - counts[comm.rank]
    ledger.post("allgather", grid.ordered(axes), words, send.dtype.itemsize, begun)
    return arrived(recv, block)


def reduce_scatter(block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], op: str = SUM) -> Block:
    """Return this rank's piece of the sum over the group; piece r has `counts[r]` elements, in order.

    **Communication:** reduce_scatter, ``(p - 1) x own`` words received. **Adjoint:** `allgather`.
    """
    comm, begun = grid.comm(axes), ledger.clock.now()
    _require(sum(counts), block, "reduce_scatter")
    require_reducible(op, block)
    wide = widened(block)
    send, own = outgoing(wide, grid), counts[comm.rank]
    kind = mpi_type(send.dtype)
    total = landing(wide, own, grid)
    if _pairwise(counts, send):
        _reduce_pairwise(comm, send, counts, op, total, landing(wide, comm.size * min(own, _chunk(send)), grid))
    else:
        terms, recv_counts = landing(wide, comm.size * own, grid), [own] * comm.size
        places = _starts(recv_counts)
        comm.Alltoallv([send, (list(counts), _starts(counts)), kind], [terms, (recv_counts, places), kind])
        add_in_rank_order([terms[at : at + own] for at in places], total, op)
    ledger.post("reduce_scatter", grid.ordered(axes), (comm.size - 1) * own, send.dtype.itemsize, begun)
    result = arrived(total, wide)
    return result if wide is block else cast(result, block.dtype)


def widened(block: Block) -> Block:
    """Return `block` in a dtype in which MPI adds as it should.

    16-bit floats would lose digits, and Open MPI's vectorised sums of 8- and 16-bit integers stop at the greatest one
    instead of wrapping round.
    """
    wide = backend.wide_dtype(block)
    return block if wide is None else cast(block, wide)


def cast(block: Block, dtype: Any) -> Block:
    """Return `block` in another dtype."""
    return backend.namespace(block).astype(block, dtype)


def all_to_all(
    block: Block,
    grid: Grid,
    axes: Sequence[str],
    counts: Sequence[int],
    recv_counts: Sequence[int],
    most: int | None = None,
) -> Block:
    """Return what each rank of the group sent to this one, in order, flat; piece r of `block` goes to rank r.

    `most` bounds what any rank sends or receives in all, alike on every rank: each knows its own counts alone, and all
    must go the same way. Without it the pieces go rank by rank, which is right for any counts and slow for small ones.

    **Communication:** all_to_all, ``sum(recv_counts) - own`` words received. **Adjoint:** itself, counts swapped.
    """
    comm, begun = grid.comm(axes), ledger.clock.now()
    _require(sum(counts), block, "all_to_all")
    send, recv = outgoing(block, grid), landing(block, sum(recv_counts), grid)
    kind, starts, places = mpi_type(send.dtype), _starts(counts), _starts(recv_counts)
    if most is None or most > _LIMIT:
        _exchange_pairwise(comm, _pieces(send, starts, counts), _pieces(recv, places, recv_counts))
    else:
        comm.Alltoallv([send, (counts, starts), kind], [recv, (recv_counts, places), kind])
    words = sum(recv_counts) - recv_counts[comm.rank]
    ledger.post("all_to_all", grid.ordered(axes), words, send.dtype.itemsize, begun)
    return arrived(recv, block)


def bcast(block: Block, grid: Grid, axes: Sequence[str], root: int = 0) -> Block:
    """Return the block of rank `root` of the group on every rank; the others pass one of the same shape and dtype.

    **Communication:** bcast, n words received on every rank but the root. **Adjoint:** a reduction to the root.
    """
    comm, begun = grid.comm(axes), ledger.clock.now()
    buffer = outgoing(block, grid) if comm.rank == root else landing(block, block.size, grid)
    kind = mpi_type(buffer.dtype)
    for piece in messages(buffer):
        comm.Bcast([piece, kind], root)
    words = 0 if comm.rank == root else buffer.size
    ledger.post("bcast", grid.ordered(axes), words, buffer.dtype.itemsize, begun)
    return block if comm.rank == root else backend.namespace(block).reshape(arrived(buffer, block), block.shape)


def share(value: Any, grid: Grid, root: int = 0) -> Any:
    """Return the small Python object of rank `root` of the grid on every rank. Not for arrays, not in the ledger."""
    return grid.comm(tuple(grid.axes)).bcast(value, root)


def collect(value: Any, grid: Grid) -> list[Any]:
    """Return the small Python objects of all ranks of the grid, in order. Not for arrays, not in the ledger."""
    return grid.comm(tuple(grid.axes)).allgather(value)


def collect_later(value: int, grid: Grid) -> Callable[[], list[int]]:
    """Begin to collect integers from 0 to 255, as `collect`, and return what waits for those of all ranks."""
    comm = grid.comm(tuple(grid.axes))
    own, every = np.array([value], np.uint8), np.zeros(comm.size, np.uint8)
    request = comm.Iallgather([own, mpi_type(own.dtype)], [every, mpi_type(every.dtype)])

    def wait() -> list[int]:
        request.Wait()
        return every.tolist()

    return wait


@contextmanager
def agreed(grid: Grid, kind: type[ColossalError] = ColossalError) -> Iterator[None]:
    """Turn a failure that only some ranks see inside the block into the same error on all of them.

    Parameters
    ----------
    grid : Grid
    kind : type
        What an error that is none of ours becomes.

    Raises
    ------
    ColossalError
        The first failing rank's, by rank, with its own type and text.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:  # any: a rank that left now would leave the others waiting
        failure = error
    outcomes = collect(None if failure is None else (type(failure), str(failure)), grid)
    first = next((outcome for outcome in outcomes if outcome), None)
    if first is not None:
        raised: type[Exception] = first[0] if issubclass(first[0], ColossalError) else kind
        raise raised(first[1]) from failure
