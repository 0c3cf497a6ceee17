"""The one file that gives buffers to MPI.

Every function takes this rank's block and the grid axes that span the group. It checks that the block is of the size
that the caller's plan, which all ranks make from the same global metadata, gives this rank: a mismatch is silently
wrong in some MPIs and overwrites the heap in Open MPI. Blocks that MPI cannot read are staged through host memory, what
arrived is entered into the ledger, and float16 is summed in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import backend, ledger, shared
from colossal_mpi.backend import Block
from colossal_mpi.errors import ColossalError, DTypeError, ShapeError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import part

SUM, MAX = "sum", "max"
_MPI = {SUM: MPI.SUM, MAX: MPI.MAX}
_LOCAL: dict[str, Callable[..., Block]] = {
    SUM: lambda xp, a, b: a + b,
    MAX: lambda xp, a, b: xp.maximum(a, b),
}


def _wire(block: Block) -> Any:
    """Return the buffer that MPI reads for `block`: its own memory, or a copy in host memory."""
    if backend.mpi_can_read(block):
        block = backend.contiguous(block)  # may start a kernel: synchronise after it
        backend.synchronize(block)
        return block
    return np.ascontiguousarray(backend.to_host(block))


def _landing(block: Block, count: int, dtype: Any = None) -> Any:
    """Return a flat buffer of `count` elements that MPI can write beside `block`."""
    if backend.mpi_can_read(block):
        return backend.empty_like(block, (count,), dtype)
    return np.empty(count, backend.numpy_dtype(block.dtype if dtype is None else dtype))


def _mpi_type(dtype: Any) -> MPI.Datatype:
    known = np.dtype(dtype)
    if not known.isnative:
        raise DTypeError(f"MPI cannot carry dtype {dtype}, of foreign byte order: from_global makes it native")
    if known.kind in "biufc":  # mpi4py has a code for strings too, and carries their first characters
        with suppress(KeyError, ValueError):
            return MPI.Datatype.fromcode(known.char)
    raise DTypeError(f"MPI cannot carry dtype {dtype}: use a float, complex, integer or bool dtype")


def _starts(counts: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


# Pieces from this many bytes on go from rank to rank by Sendrecv, which MPI copies once: on one node, MPICH's allgather
# takes twice as long and its reduce_scatter 1.1 times, Open MPI's reduce_scatter 1.4 times. Words are the same.
_LARGE = 1 << 15
_TAG = 7


def _large(count: int, buffer: Any) -> bool:
    """Say whether pieces of at most `count` elements are large; all ranks of a group pass the same count."""
    return count * buffer.dtype.itemsize >= _LARGE


def _shifts(comm: MPI.Intracomm) -> Iterator[tuple[int, int]]:
    """Yield, for each of p - 1 steps, the rank to send to and the one to receive from."""
    for step in range(1, comm.size):
        yield (comm.rank + step) % comm.size, (comm.rank - step) % comm.size


def _pieces(buffer: Any, starts: Sequence[int], counts: Sequence[int]) -> Callable[[int], Any]:
    return lambda rank: buffer[starts[rank] : starts[rank] + counts[rank]]


def _reduce_pairwise(
    comm: MPI.Intracomm, send: Any, kind: MPI.Datatype, counts: Sequence[int], op: str, recv: Any
) -> Any:
    """Add to this rank's own piece those of the others, from the rank before it backwards."""
    piece, xp = _pieces(send.reshape(-1), _starts(counts), counts), backend.namespace(send)
    total = piece(comm.rank)
    for to, source in _shifts(comm):
        comm.Sendrecv([piece(to), kind], to, _TAG, [recv, kind], source, _TAG)
        total = _LOCAL[op](xp, total, recv)
        backend.synchronize(recv)  # the next message must not land before it is added
    return total


def _require(count: int, block: Block, what: str) -> None:
    if block.size != count:
        raise ShapeError(f"{what}: the block has {block.size} elements and the plan needs {count}")


def _require_op(op: str, block: Block) -> None:
    kind = backend.numpy_dtype(block.dtype).kind
    if kind == "b" or (op == MAX and kind == "c"):
        raise DTypeError(f"the {op} of {block.dtype} over ranks: cast it first, bool to an integer, complex to a float")


def allgather(
    block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], starts: Sequence[int] | None = None
) -> Block:
    """Return the flat blocks of all ranks of the group, rank r's `counts[r]` elements at `starts[r]`.

    **Communication:** allgather, ``sum(counts) - own`` words received. **Adjoint:** `reduce_scatter`.
    """
    comm, begun = grid.comm(axes), time.perf_counter()
    _require(counts[comm.rank], block, "allgather")
    send, recv = _wire(block), _landing(block, sum(counts))
    kind = _mpi_type(send.dtype)
    starts = starts or _starts(counts)
    if _large(max(counts), send):
        own, flat = _pieces(recv, starts, counts), send.reshape(-1)
        own(comm.rank)[...] = flat
        for to, source in _shifts(comm):
            comm.Sendrecv([flat, kind], to, _TAG, [own(source), kind], source, _TAG)
    else:
        comm.Allgatherv([send, kind], [recv, (counts, starts), kind])
    words = sum(counts) - counts[comm.rank]
    ledger.post("allgather", grid.ordered(axes), words, send.dtype.itemsize, begun)
    return backend.to_block(recv, block)


def reduce_scatter(block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], op: str = SUM) -> Block:
    """Return this rank's piece of the sum over the group; piece r has `counts[r]` elements, in order.

    **Communication:** reduce_scatter, ``(p - 1) x own`` words received. **Adjoint:** `allgather`.
    """
    comm, begun = grid.comm(axes), time.perf_counter()
    _require(sum(counts), block, "reduce_scatter")
    _require_op(op, block)
    dtype = backend.numpy_dtype(block.dtype)
    send = _wire(_widened(block))
    own = counts[comm.rank]
    kind = _mpi_type(send.dtype)
    if _large(max(counts), send):
        recv = _reduce_pairwise(comm, send, kind, counts, op, _landing(block, own, send.dtype))
    else:
        recv = _landing(block, own, send.dtype)
        # With counts: Open MPI's Reduce_scatter_block moves up to 1.5x the words on two ranks.
        comm.Reduce_scatter([send, kind], [recv, kind], list(counts), _MPI[op])
    ledger.post("reduce_scatter", grid.ordered(axes), (comm.size - 1) * own, send.dtype.itemsize, begun)
    result = backend.to_block(recv, block)
    return result if backend.numpy_dtype(result.dtype) == dtype else cast(result, block.dtype)


def _widened(block: Block) -> Block:
    """Return `block` in a dtype in which MPI can add without losing half of its digits."""
    if backend.numpy_dtype(block.dtype).itemsize > 2 or backend.numpy_dtype(block.dtype).kind in "iub":
        return block
    return cast(block, backend.namespace(block).float32)


def cast(block: Block, dtype: Any) -> Block:
    """Return `block` in another dtype."""
    return backend.namespace(block).astype(block, dtype)


def allreduce(block: Block, grid: Grid, axes: Sequence[str], op: str = SUM) -> Block:
    """Return the sum (or maximum) over the group, on every rank, bitwise equal on all of them.

    A reduce_scatter and an allgather, so that each element is summed once, by one rank. Two ranks swap their blocks
    instead: the same words in one message, and the same bits, since addition commutes.

    **Communication:** ``(p - 1) x own + n - own`` words received, own being a 1/p part. **Adjoint:** itself.
    """
    if grid.extent(axes) == 1:
        return block
    _require_op(op, block)
    comm, xp = grid.comm(axes), backend.namespace(block)
    if comm.size == 2:
        both = xp.reshape(_swap(block, grid, axes), (2, *block.shape))
        return cast(_LOCAL[op](xp, both[0, ...], both[1, ...]), block.dtype)
    pieces = [part(block.size, comm.size, r) for r in range(comm.size)]
    counts = [stop - start for start, stop in pieces]
    own = reduce_scatter(xp.reshape(block, (-1,)), grid, axes, counts, op)
    return xp.reshape(allgather(own, grid, axes, counts), block.shape)


def _swap(block: Block, grid: Grid, axes: Sequence[str]) -> Block:
    flat = backend.namespace(block).reshape(block, (-1,))
    return _widened(allgather(flat, grid, axes, [block.size] * 2))


def all_to_all(
    block: Block, grid: Grid, axes: Sequence[str], counts: Sequence[int], recv_counts: Sequence[int]
) -> Block:
    """Return what each rank of the group sent to this one, in order, flat; piece r of `block` goes to rank r.

    **Communication:** all_to_all, ``sum(recv_counts) - own`` words received. **Adjoint:** itself, counts swapped.
    """
    comm, begun = grid.comm(axes), time.perf_counter()
    _require(sum(counts), block, "all_to_all")
    send, recv = _wire(block), _landing(block, sum(recv_counts))
    kind = _mpi_type(send.dtype)
    comm.Alltoallv([send, (counts, _starts(counts)), kind], [recv, (recv_counts, _starts(recv_counts)), kind])
    words = sum(recv_counts) - recv_counts[comm.rank]
    ledger.post("all_to_all", grid.ordered(axes), words, send.dtype.itemsize, begun)
    return backend.to_block(recv, block)


def bcast(block: Block, grid: Grid, axes: Sequence[str], root: int = 0) -> Block:
    """Return the block of rank `root` of the group on every rank; the others pass one of the same shape and dtype.

    **Communication:** bcast, n words received on every rank but the root. **Adjoint:** a reduction to the root.
    """
    comm, begun = grid.comm(axes), time.perf_counter()
    buffer = _wire(block) if comm.rank == root else _landing(block, block.size)
    comm.Bcast([buffer, _mpi_type(buffer.dtype)], root)
    words = 0 if comm.rank == root else buffer.size
    ledger.post("bcast", grid.ordered(axes), words, buffer.dtype.itemsize, begun)
    return backend.namespace(block).reshape(backend.to_block(buffer, block), block.shape)


def share(value: Any, grid: Grid, root: int = 0) -> Any:
    """Return the small Python object of rank `root` of the grid on every rank. Not for arrays, not in the ledger."""
    return grid.comm(tuple(grid.axes)).bcast(value, root)


def collect(value: Any, grid: Grid) -> list[Any]:
    """Return the small Python objects of all ranks of the grid, in order. Not for arrays, not in the ledger."""
    return grid.comm(tuple(grid.axes)).allgather(value)


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


class Pending:
    """An exchange under way: the blocks that it receives hold their values after `wait`."""

    def __init__(self, requests: list[MPI.Request], landings: list[tuple[Any, Block]], entry: tuple[Any, ...]) -> None:
        self._requests, self._landings, self._entry = requests, landings, entry

    def wait(self) -> None:
        """Wait until everything is sent and received, and enter what was received into the ledger."""
        begun = time.perf_counter()
        MPI.Request.Waitall(self._requests)
        for buffer, block in self._landings:
            if buffer is not block:
                block[...] = backend.namespace(block).reshape(backend.to_block(buffer, block), block.shape)
        axes, words, itemsize, posted = self._entry
        ledger.post("all_to_all", axes, words, itemsize, begun - posted)


def start_exchange(
    grid: Grid, axes: Sequence[str], send: Sequence[tuple[int, Block]], recv: Sequence[tuple[int, Block]]
) -> Pending:
    """Send blocks to ranks of the group and receive from them into blocks that are there, while the caller goes on.

    Parameters
    ----------
    grid : Grid
    axes : sequence of str
        That span the group.
    send, recv : sequence of (int, array)
        Rank of the group and a contiguous block. What one rank sends to another it receives in the same order.

    **Communication:** all_to_all, the words of `recv`. **Adjoint:** itself, send and recv swapped.
    """
    comm, begun = grid.comm(axes), time.perf_counter()
    landings = [(block if backend.mpi_can_read(block) else _landing(block, block.size), block) for _, block in recv]
    requests = [
        comm.Irecv([buffer, _mpi_type(buffer.dtype)], source, _TAG)
        for (source, _), (buffer, _) in zip(recv, landings, strict=True)
    ]
    for to, block in send:
        buffer = _wire(block)
        requests.append(comm.Isend([buffer, _mpi_type(buffer.dtype)], to, _TAG))
    words = sum(block.size for _, block in recv)
    itemsize = recv[0][1].dtype.itemsize if recv else 0
    return Pending(requests, landings, (grid.ordered(axes), words, itemsize, time.perf_counter() - begun))


@contextmanager
def reading(
    block: Block, grid: Grid, axes: Sequence[str], shapes: Sequence[Sequence[int]], words: int, lend: bool = True
) -> Iterator[list[Block] | None]:
    """Let the ranks of a group on one node read each other's blocks where they lie, until the context ends.

    A block outside the shareable memory is copied into it first, or, if `lend` is false, all ranks get None. No rank
    leaves before all have read.

    Parameters
    ----------
    block : array
        This rank's; nobody may write to it inside the context.
    grid : Grid
    axes : sequence of str
        That span the group; `Grid.peers` must know its ranks.
    shapes : sequence of tuple of int
        Of the blocks of all ranks of the group.
    words : int
        How many elements of other ranks this one reads, for the ledger.
    """
    group, begun = grid.comm(axes), time.perf_counter()
    memories = grid.peers(axes)
    assert memories is not None, "the ranks of this group cannot read each other's memory"
    lent = shared.lend(block) if lend else block
    told = np.empty((group.size, 1 + block.ndim), np.int64)
    group.Allgather(np.array(shared.describe(lent), np.int64), told)
    if min(told[:, 0]) < 0:
        yield None
        return
    ledger.post("read", grid.ordered(axes), words, block.dtype.itemsize, begun)
    yield [
        block if rank == group.rank else shared.view(memory, shape, block.dtype, where)
        for rank, (memory, shape, where) in enumerate(zip(memories, shapes, told.tolist(), strict=True))
    ]
    group.Barrier()
