"""Blocking collectives on blocks, and the one order in which the terms of a reduction are added.

With `colossal_mpi.comm.messages` this is the only module that gives buffers to MPI. `redistribution`, `linalg` and
`layers` call it; it calls `colossal_mpi.comm.staging`, which gives a block to MPI as it is or as a copy, and enters
received words into the ledger. Every function takes this rank's block and the grid axes that span the group, and checks
that the block has the size that the caller's plan gives this rank: MPI either accepts a mismatch silently or overwrites
the heap.

**The order of sums.** A reduction adds its terms in the order of the ranks, ((0 + 1) + 2) + ..., whether they arrive in
small or large pieces, by nonblocking messages, or from the memory of a neighbour. MPI's own reductions add in an order
that depends on the size and on the library, so none of them is used: the ranks exchange the pieces (`all_to_all`),
which receives the same ``(p - 1) own`` words as a reduce_scatter, and `add_in_rank_order` adds them. 16-bit floats are
summed in float32 and rounded once; small integers are summed in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, zip_longest
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import DTypeLike

from colossal_mpi import ledger
from colossal_mpi.comm import check
from colossal_mpi.comm.staging import from_buffer, recv_buffer, send_buffer
from colossal_mpi.errors import ColossalError, DTypeError, GridError, OptionError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

T = TypeVar("T")
SUM, MAX = "sum", "max"
"""The reductions: the sum of the terms, and the greatest of them."""


def mpi_type(dtype: DTypeLike) -> MPI.Datatype:
    """Return the MPI type of the elements of a buffer of this dtype."""
    known = np.dtype(dtype)
    if not known.isnative:
        raise DTypeError(f"MPI cannot carry dtype {dtype}, of foreign byte order: from_global makes it native")
    if known.kind in "biufc":  # mpi4py has a code for strings too, and carries their first characters
        with suppress(KeyError, ValueError):
            return MPI.Datatype.fromcode(known.char)
    raise DTypeError(f"MPI cannot carry dtype {dtype}: use a float, complex, integer or bool dtype")


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts[:-1])] if counts else []


# Pieces of at least this many bytes go from rank to rank by Sendrecv, which MPI copies once: on one node, MPICH's
# allgather takes twice as long. The words are the same.
_LARGE = 1 << 15
# A large reduction receives pieces of at most this many bytes from each rank, adds them, and goes on with the next.
_CHUNK = 1 << 20
# The greatest number of elements of one message: MPI's counts and displacements are C ints.
_LIMIT = (1 << 31) - 1
_TAG = 7


def _pairwise(counts: Sequence[int], buffer: Block) -> bool:
    """Return whether pieces of these counts go from rank to rank; the answer is the same on all ranks of a group."""
    return bool(max(counts) * buffer.dtype.itemsize >= _LARGE or sum(counts) > _LIMIT)


def split_messages(buffer: Block) -> list[Block]:
    """Return a flat buffer as the messages that carry it; an empty one needs none."""
    return [buffer[start : start + _LIMIT] for start in range(0, buffer.size, _LIMIT)]


def _swap(comm: MPI.Intracomm, send: Block, to: int, recv: Block, source: int) -> None:
    """Send a flat piece to one rank while receiving one from another.

    Sender and receiver know the count of the piece, so they give its messages the same numbers. Every rank sends and
    receives in the order of these numbers: the message with the lowest number can always go, and no rank waits for
    ever.
    """
    kind = mpi_type(send.dtype)
    for out, into in zip_longest(split_messages(send), split_messages(recv)):
        comm.Sendrecv(
            None if out is None else [out, kind],
            MPI.PROC_NULL if out is None else to,
            _TAG,
            None if into is None else [into, kind],
            MPI.PROC_NULL if into is None else source,
            _TAG,
        )


def _shifts(comm: MPI.Intracomm) -> Iterator[tuple[int, int]]:
    """Yield the rank to send to and the rank to receive from in each of p - 1 steps."""
    for step in range(1, comm.size):
        yield (comm.rank + step) % comm.size, (comm.rank - step) % comm.size


def _pieces(buffer: Block, starts: Sequence[int], counts: Sequence[int]) -> Callable[[int], Block]:
    return lambda rank: buffer[starts[rank] : starts[rank] + counts[rank]]


def _exchange_pairwise(comm: MPI.Intracomm, piece: Callable[[int], Block], place: Callable[[int], Block]) -> None:
    """Send ``piece(r)`` to each rank r and receive ``place(r)`` from it; this rank copies its own piece."""
    for to, source in _shifts(comm):
        _swap(comm, piece(to), to, place(source), source)
    place(comm.rank)[...] = piece(comm.rank)  # last: a kernel on a GPU, and messages need an idle stream


def add_in_rank_order(terms: Sequence[Block], out: Block, op: str = SUM) -> Block:
    """Put the sum (or maximum) of the terms of all ranks of a group into `out`: ((0 + 1) + 2) + ...

    Every reduction of the package ends here, so that its bits do not depend on how the terms came.

    Parameters
    ----------
    terms : sequence of array
        The term of each rank, in the order of the ranks; all of one shape.
    out : array
        A block of this shape, of a dtype in which the terms are to be added. It may share memory with the first term
        only.
    op : {"sum", "max"}
        The reduction.

    Returns
    -------
    array
        The block `out`.
    """
    out[...] = terms[0]
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are results, as in MPI's own reductions
        for term in terms[1:]:
            if op == SUM:
                out += term
            else:
                out[...] = backend.namespace(out).maximum(out, term)
    return out


def _reduce_pairwise(
    comm: MPI.Intracomm, send: Block, counts: Sequence[int], op: str, total: Block, terms: Block
) -> None:
    """Reduce large pieces into `total`: `terms` takes at most `_CHUNK` bytes of each rank's term at a time."""
    piece, me = _pieces(send, _starts(counts), counts), comm.rank
    width = _chunk(send)
    for low in range(0, max(counts), width):
        here = total[low : low + width]
        rows = [terms[r * here.size : (r + 1) * here.size] for r in range(comm.size)]
        rows[me] = piece(me)[low : low + width]
        # chunk of X[N] {U_axes} -> chunk of X[U_axes, N_axes]: pieces from rank to rank; then the sum over U
        for to, source in _shifts(comm):
            _swap(comm, piece(to)[low : low + width], to, rows[source], source)
        add_in_rank_order(rows, here, op)
        backend.synchronize(total)  # the next messages must not land before these terms are added


def _chunk(buffer: Block) -> int:
    """Return how many elements of each rank's term a large reduction adds at a time."""
    return max(1, int(_CHUNK // buffer.dtype.itemsize))


def _require(count: int, block: Block, what: str) -> None:
    if block.size != count:
        raise ShapeError(f"{what}: the block has {block.size} elements and the plan needs {count}")


def require_reducible(op: str, block: Block) -> None:
    """Refuse an unknown reduction, and the dtypes that have no such reduction."""
    if op not in (SUM, MAX):
        raise OptionError(f"reduction {op!r}: use {SUM!r} or {MAX!r}")
    kind = backend.numpy_dtype(block.dtype).kind
    if kind == "b" or (op == MAX and kind == "c"):
        raise DTypeError(f"the {op} of {block.dtype} over ranks: cast it first, bool to an integer, complex to a float")


def allgather(
    block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], starts: Sequence[int] | None = None
) -> Block:
    """Return the flat blocks of all ranks of a group as one flat block.

    Parameters
    ----------
    block : array
        This rank's flat block, of ``counts[rank]`` elements.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    counts : sequence of int
        The elements of each rank's block.
    starts : sequence of int, optional
        Where each rank's block starts in the result; one after the other by default.

    Returns
    -------
    array
        The blocks of all ranks, ``[sum(counts)]``, on the device of `block`.

    Raises
    ------
    ShapeError
        If the block has another number of elements than the plan gives it.
    DTypeError
        If MPI has no type for the elements.

    Notes
    -----
    **Communication:** allgather over `axes`, ``sum(counts) - own`` words received. **Adjoint:** `reduce_scatter`.
    """
    check.agree("allgather", grid, axes, dtype=block.dtype, counts=counts)
    comm, begun = grid.comm(axes), ledger.clock.now()
    _require(counts[comm.rank], block, "allgather")
    send, recv = send_buffer(block, grid), recv_buffer(block, sum(counts), grid)
    kind = mpi_type(send.dtype)
    starts = starts or _starts(counts)
    # X[N_axes] -> X[N]: allgather over axes
    if _pairwise(counts, send):
        _exchange_pairwise(comm, lambda _: send, _pieces(recv, starts, counts))
    else:
        comm.Allgatherv([send, kind], [recv, (counts, starts), kind])
    words = sum(counts) - counts[comm.rank]
    ledger.post("allgather", grid.ordered(axes), words, send.dtype.itemsize, begun)
    return from_buffer(recv, block)


def reduce_scatter(block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], op: str = SUM) -> Block:
    """Return this rank's piece of the sum (or maximum) of the blocks of a group.

    Parameters
    ----------
    block : array
        This rank's term, flat: the pieces of rank 0, 1, ... one after the other, ``[sum(counts)]``.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    counts : sequence of int
        The elements of each rank's piece.
    op : {"sum", "max"}
        The reduction.

    Returns
    -------
    array
        This rank's piece, ``[counts[rank]]``, of the dtype of `block`; its terms are added in the order of the ranks.

    Raises
    ------
    ShapeError
        If the block has another number of elements than the plan gives it.
    DTypeError
        If the elements have no such reduction, or MPI has no type for them.

    Notes
    -----
    **Communication:** reduce_scatter over `axes`, ``(p - 1) own`` words received, as an all_to_all of the pieces.
    **Adjoint:** `allgather`.
    """
    check.agree("reduce_scatter", grid, axes, reduction=op, dtype=block.dtype, counts=counts)
    comm, begun = grid.comm(axes), ledger.clock.now()
    _require(sum(counts), block, "reduce_scatter")
    require_reducible(op, block)
    wide = widened(block)
    send, own = send_buffer(wide, grid), counts[comm.rank]
    kind = mpi_type(send.dtype)
    total = recv_buffer(wide, own, grid)
    if _pairwise(counts, send):
        _reduce_pairwise(comm, send, counts, op, total, recv_buffer(wide, comm.size * min(own, _chunk(send)), grid))
    else:
        terms, recv_counts = recv_buffer(wide, comm.size * own, grid), [own] * comm.size
        places = _starts(recv_counts)
        # X[N] {U_axes} -> X[U_axes, N_axes]: all_to_all; then the sum over U in the order of the ranks
        comm.Alltoallv([send, (list(counts), _starts(counts)), kind], [terms, (recv_counts, places), kind])
        add_in_rank_order([terms[at : at + own] for at in places], total, op)
    ledger.post("reduce_scatter", grid.ordered(axes), (comm.size - 1) * own, send.dtype.itemsize, begun)
    result = from_buffer(total, wide)
    return result if wide is block else cast(result, block.dtype)


def widened(block: Block) -> Block:
    """Return a block in the dtype in which its elements are summed: 16-bit floats and small integers in 32 bits."""
    wide = backend.wide_dtype(block)
    return block if wide is None else cast(block, wide)


def cast(block: Block, dtype: object) -> Block:
    """Return a block in another dtype."""
    return backend.namespace(block).astype(block, dtype)


def all_to_all(
    block: Block,
    grid: Grid,
    axes: Sequence[str],
    counts: Sequence[int],
    recv_counts: Sequence[int],
    most: int | None = None,
) -> Block:
    """Send a piece of this rank's block to each rank of a group and return the pieces that they sent to this one.

    Parameters
    ----------
    block : array
        This rank's flat block: the pieces for rank 0, 1, ... one after the other, ``[sum(counts)]``.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    counts : sequence of int
        The elements that this rank sends to each rank.
    recv_counts : sequence of int
        The elements that this rank receives from each rank.
    most : int, optional
        A bound, the same on every rank, on the elements that any rank sends or receives in total. A rank knows only its
        own counts, but all must choose the same algorithm. Without it the pieces go from rank to rank, which is right
        for any counts and slow for small ones.

    Returns
    -------
    array
        The pieces from rank 0, 1, ... one after the other, ``[sum(recv_counts)]``.

    Raises
    ------
    ShapeError
        If the block has another number of elements than `counts`.
    DTypeError
        If MPI has no type for the elements.

    Notes
    -----
    **Communication:** all_to_all over `axes`, ``sum(recv_counts) - own`` words received. **Adjoint:** itself, with the
    counts swapped.
    """
    check.agree("all_to_all", grid, axes, (counts, recv_counts), dtype=block.dtype, most=most)
    comm, begun = grid.comm(axes), ledger.clock.now()
    _require(sum(counts), block, "all_to_all")
    send, recv = send_buffer(block, grid), recv_buffer(block, sum(recv_counts), grid)
    kind, starts, places = mpi_type(send.dtype), _starts(counts), _starts(recv_counts)
    # X[M_axes, N] -> X[M, N_axes]: all_to_all over axes
    if most is None or most > _LIMIT:
        _exchange_pairwise(comm, _pieces(send, starts, counts), _pieces(recv, places, recv_counts))
    else:
        comm.Alltoallv([send, (counts, starts), kind], [recv, (recv_counts, places), kind])
    words = sum(recv_counts) - recv_counts[comm.rank]
    ledger.post("all_to_all", grid.ordered(axes), words, send.dtype.itemsize, begun)
    return from_buffer(recv, block)


def bcast(block: Block, grid: Grid, axes: Sequence[str], root: int = 0) -> Block:
    """Return the block of one rank of a group on all of its ranks.

    Parameters
    ----------
    block : array
        The block of the root; the other ranks pass a block of the same shape and dtype, which is not changed.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    root : int
        The rank of the group that sends its block.

    Returns
    -------
    array
        The block of the root; on the root, `block` itself.

    Raises
    ------
    DTypeError
        If MPI has no type for the elements.
    GridError
        If the group has no such rank.

    Notes
    -----
    **Communication:** bcast over `axes`, n words received on every rank but the root. **Adjoint:** a reduction to the
    root.
    """
    check.agree("bcast", grid, axes, root=root, dtype=block.dtype, shape=tuple(block.shape))
    comm, begun = grid.comm(axes), ledger.clock.now()
    if not 0 <= root < comm.size:
        raise GridError(f"bcast(root={root}) over {grid.ordered(axes)} of {grid}: it must be from 0 to {comm.size - 1}")
    buffer = send_buffer(block, grid) if comm.rank == root else recv_buffer(block, block.size, grid)
    kind = mpi_type(buffer.dtype)
    # X[N] on the root -> X[N] on every rank: bcast over axes
    for piece in split_messages(buffer):
        comm.Bcast([piece, kind], root)
    words = 0 if comm.rank == root else buffer.size
    ledger.post("bcast", grid.ordered(axes), words, buffer.dtype.itemsize, begun)
    return block if comm.rank == root else backend.namespace(block).reshape(from_buffer(buffer, block), block.shape)


def share(value: Any, grid: Grid, root: int = 0) -> Any:
    """Return a small Python object of one rank of the grid on every rank.

    Parameters
    ----------
    value : object
        The object of the root, which is pickled; the objects of the other ranks are not read. Do not pass arrays.
    grid : Grid
        The grid.
    root : int
        The rank of the grid that sends its object.

    Returns
    -------
    object
        The object of the root.

    Notes
    -----
    **Communication:** a broadcast over the grid, which the ledger does not count.
    """
    check.agree("share", grid, tuple(grid.axes), root=root)
    return grid.comm(tuple(grid.axes)).bcast(value, root)


def collect(value: T, grid: Grid) -> list[T]:
    """Return the small Python objects of all ranks of the grid, in the order of the ranks.

    Parameters
    ----------
    value : object
        This rank's object, which is pickled. Do not pass arrays.
    grid : Grid
        The grid.

    Returns
    -------
    list of object
        The objects of rank 0, 1, ...

    Notes
    -----
    **Communication:** an allgather over the grid, which the ledger does not count.
    """
    check.agree("collect", grid, tuple(grid.axes))
    values: list[T] = grid.comm(tuple(grid.axes)).allgather(value)
    return values


def collect_later(value: int, grid: Grid) -> Callable[[], list[int]]:
    """Begin to collect small integers of all ranks of the grid, and return at once.

    Parameters
    ----------
    value : int
        This rank's integer, from 0 to 255.
    grid : Grid
        The grid.

    Returns
    -------
    callable
        A function that waits for the integers and returns the list of rank 0's, 1's, ...

    Notes
    -----
    **Communication:** a nonblocking allgather over the grid, one byte of each rank, which the ledger does not count.
    """
    call = check.begin("collect_later", grid, tuple(grid.axes))
    comm = grid.comm(tuple(grid.axes))
    own, every = np.array([value], np.uint8), np.zeros(comm.size, np.uint8)
    request = comm.Iallgather([own, mpi_type(own.dtype)], [every, mpi_type(every.dtype)])

    def wait() -> list[int]:
        if call is not None:
            call.end()
        request.Wait()
        return [int(of_rank) for of_rank in every]

    return wait


@contextmanager
def agreed(grid: Grid, kind: type[ColossalError] = ColossalError) -> Iterator[None]:
    """Make a failure that only some ranks see the same error on all of them.

    Parameters
    ----------
    grid : Grid
        The grid, all of whose ranks enter the context.
    kind : type
        The type of error that all ranks raise where the failure is no `ColossalError`.

    Yields
    ------
    None
        The context, inside which a rank may fail.

    Raises
    ------
    ColossalError
        The failure of the first failing rank, with its own type and text.

    Notes
    -----
    **Communication:** one `collect` at the end.

    Examples
    --------
    >>> with comm.agreed(grid, CheckpointError):
    ...     if grid.rank == 0:
    ...         file = open(path)
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:  # any: a rank that left here would leave the others waiting
        failure = error
    outcomes = collect(None if failure is None else (type(failure), str(failure)), grid)
    first = next((outcome for outcome in outcomes if outcome), None)
    if first is not None:
        raised: type[Exception] = first[0] if issubclass(first[0], ColossalError) else kind
        raise raised(first[1]) from failure
