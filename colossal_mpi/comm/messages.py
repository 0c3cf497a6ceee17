"""Transfers of blocks without a collective: nonblocking messages, and reading in the shared memory of one node.

`colossal_mpi.comm.transport`, the products of linalg and the layers that overlap communication call it. With
`colossal_mpi.comm.collectives` this is the only module that gives buffers to MPI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from colossal_mpi import ledger
from colossal_mpi.comm import check
from colossal_mpi.comm.collectives import mpi_type, split_messages
from colossal_mpi.comm.staging import from_buffer, recv_buffer, send_buffer
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend, shared_memory
from colossal_mpi.platform.backend import Block

_TAG = 8
"""The tag of the messages of stream 0; stream i has the i-th tag after it."""


@dataclass(frozen=True)
class _Entry:
    """The ledger's entry of an exchange, except the time of its end."""

    op: str
    axes: tuple[str, ...]
    words: int
    itemsize: int
    begun: float
    posted: float
    due: float
    site: str


class Pending:
    """An exchange under way: the blocks that it receives hold their values when `wait` returns or `done` is true.

    Parameters
    ----------
    requests : list of MPI.Request
        The messages.
    sent : list of array
        The buffers that MPI reads, which must live until the end.
    received : list of (array, array)
        Each buffer that MPI writes, and the block to which it is copied.
    entry : object
        The ledger's entry.
    """

    def __init__(
        self, requests: list[MPI.Request], sent: list[Block], received: list[tuple[Block, Block]], entry: _Entry
    ) -> None:
        self._requests, self._sent, self._received, self._entry = requests, sent, received, entry
        self._ended = False

    def done(self) -> bool:
        """Return whether everything is sent and received, without waiting, and let MPI progress.

        Returns
        -------
        bool
            True if the exchange is over.
        """
        if not self._ended:
            begun = ledger.clock.now()
            if begun >= self._entry.due and MPI.Request.Testall(self._requests):
                self._end(begun)
        return self._ended

    def wait(self) -> None:
        """Wait until everything is sent and received."""
        if not self._ended:
            begun = ledger.clock.now()
            MPI.Request.Waitall(self._requests)
            self._end(begun)

    def _end(self, waited: float) -> None:
        """Copy the received buffers to their blocks, and enter the exchange into the ledger."""
        for buffer, block in self._received:
            if buffer is not block:
                block[...] = backend.namespace(block).reshape(from_buffer(buffer, block), block.shape)
        self._ended, self._requests, self._sent, self._received = True, [], [], []
        e = self._entry
        ledger.post(e.op, e.axes, e.words, e.itemsize, e.begun, e.posted, waited, e.due, e.site)


def start_exchange(
    grid: Grid,
    axes: Sequence[str],
    send: Sequence[tuple[int, Block]],
    recv: Sequence[tuple[int, Block]],
    stream: int = 0,
    op: str = "all_to_all",
) -> Pending:
    """Begin to send blocks to ranks of a group and to receive blocks from them, and return at once.

    Parameters
    ----------
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    send : sequence of (int, array)
        Ranks of the group and the blocks that go to them. Nobody may write to the blocks before the end.
    recv : sequence of (int, array)
        Ranks of the group and the contiguous blocks to receive from them, in the order in which each rank sends.
    stream : int
        The stream of the messages: messages of one stream arrive in order, messages of different streams may overtake
        one another.
    op : str
        The name of the operation in the ledger.

    Returns
    -------
    Pending
        The exchange under way.

    Raises
    ------
    DTypeError
        If MPI has no type for the elements.

    Notes
    -----
    **Communication:** one message for each block from rank to rank, the words of `recv` received. **Adjoint:** itself,
    with `send` and `recv` swapped.
    """
    comm, begun = grid.comm(axes), ledger.clock.now()
    received = [(_into(block, grid), block) for _, block in recv]
    requests = []
    for (source, _), (buffer, _) in zip(recv, received, strict=True):
        requests += [
            comm.Irecv([m, mpi_type(m.dtype)], source, _TAG + stream) for m in split_messages(buffer.reshape(-1))
        ]
    sent = [send_buffer(block, grid) for _, block in send]
    for (to, _), buffer in zip(send, sent, strict=True):
        requests += [comm.Isend([m, mpi_type(m.dtype)], to, _TAG + stream) for m in split_messages(buffer)]
    words = sum(block.size for _, block in recv)
    itemsize = backend.numpy_dtype(recv[0][1].dtype).itemsize if recv else 0
    due = ledger.clock.arrival(op, axes, words * itemsize)
    entry = _Entry(op, grid.ordered(axes), words, itemsize, begun, ledger.clock.now(), due, ledger.site())
    return Pending(requests, sent, received, entry)


def progress(grid: Grid) -> None:
    """Let MPI progress with messages under way: many MPIs move large messages only while they are called.

    Parameters
    ----------
    grid : Grid
        A grid.
    """
    grid.comm(tuple(grid.axes)).Iprobe(MPI.ANY_SOURCE, _TAG)


def _into(block: Block, grid: Grid) -> Block:
    """Return the buffer that MPI writes for a block: the block itself if MPI can write it, else a buffer to copy."""
    device = backend.device_of(block)
    own = type(block) is np.ndarray if device is None else grid.awareness.aware
    if not own or backend.is_half(block.dtype):
        return recv_buffer(block, block.size, grid)
    if device is not None:
        device.synchronize()  # a kernel may still read the previous contents
    return block


@contextmanager
def reading(
    block: Block,
    grid: Grid,
    axes: Sequence[str],
    shapes: Sequence[Sequence[int]],
    words: int,
    *,
    lend: bool = True,
    leaf: bool = True,
) -> Iterator[list[Block] | None]:
    """Let the ranks of a group on one node read each other's blocks where they lie, until the context ends.

    No rank leaves the context before all ranks have read.

    Parameters
    ----------
    block : array
        This rank's block; nobody may write to it inside the context.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group, all of whose ranks share the memory of one node (`Grid.peers`).
    shapes : sequence of tuple of int
        The shapes of the blocks of all ranks of the group.
    words : int
        The elements of other ranks that this rank reads, for the ledger.
    lend : bool
        Whether a block that lies outside the shareable memory is copied into it; if not, such a block makes all ranks
        get None.
    leaf : bool
        Whether nothing is communicated inside the context: then an exception in it leaves no rank waiting.

    Yields
    ------
    list of array or None
        The blocks of all ranks of the group, which cannot be written; None on all ranks if one block does not lie in
        shareable memory and cannot be lent.

    Notes
    -----
    **Communication:** `words` words read, and two small collectives over `axes`. **Adjoint:** a reduce_scatter of the
    cotangents of the blocks that were read.
    """
    check.agree("reading", grid, axes, dtype=block.dtype, shapes=shapes)
    group, begun = grid.comm(axes), ledger.clock.now()
    memories = grid.peers(axes)
    assert memories is not None, "the ranks of this group cannot read each other's memory"
    lent = shared_memory.lend(block) if lend else block
    places = np.empty((group.size, 1 + block.ndim), np.int64)
    group.Allgather(np.array(shared_memory.describe(lent), np.int64), places)
    if min(places[:, 0]) < 0:
        yield None
        return
    ledger.post("read", grid.ordered(axes), words, block.dtype.itemsize, begun)
    read = leaf
    try:
        yield [
            lent if rank == group.rank else shared_memory.view(memory, shape, block.dtype, where)
            for rank, (memory, shape, where) in enumerate(zip(memories, shapes, places.tolist(), strict=True))
        ]
        read = True
    finally:
        if read:
            group.Barrier()
