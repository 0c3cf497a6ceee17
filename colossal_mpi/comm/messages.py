"""Blocks of other ranks without a collective: messages under way while the caller goes on, and reading on one node.

With `colossal_mpi.comm` the only file that gives buffers to MPI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import ledger
from colossal_mpi.comm.collectives import messages, mpi_type
from colossal_mpi.comm.staging import arrived, landing, outgoing
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend, shared_memory
from colossal_mpi.platform.backend import Block

_TAG = 8
"""Of the first stream of messages; stream i has this and i."""


@dataclass(frozen=True)
class _Entry:
    """What the ledger is told of an exchange, but for its end."""

    op: str
    axes: tuple[str, ...]
    words: int
    itemsize: int
    begun: float
    posted: float
    due: float
    site: str


class Pending:
    """An exchange under way: the blocks that it receives hold their values after `wait`, or once it is `done`."""

    def __init__(
        self, requests: list[MPI.Request], sent: list[Any], landings: list[tuple[Any, Block]], entry: _Entry
    ) -> None:
        self._requests, self._sent, self._landings, self._entry = requests, sent, landings, entry
        self._ended = False

    def done(self) -> bool:
        """Say, without waiting, whether everything is sent and received; MPI gets on with it."""
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
        """Bring what was received to its blocks, and enter it into the ledger."""
        for buffer, block in self._landings:
            if buffer is not block:
                block[...] = backend.namespace(block).reshape(arrived(buffer, block), block.shape)
        self._ended, self._requests, self._sent, self._landings = True, [], [], []
        e = self._entry
        ledger.post(e.op, e.axes, e.words, e.itemsize, e.begun, e.posted, waited, e.due, e.site)


def start(
    grid: Grid,
    axes: Sequence[str],
    send: Sequence[tuple[int, Block]],
    recv: Sequence[tuple[int, Block]],
    stream: int = 0,
    op: str = "all_to_all",
) -> Pending:
    """Send blocks to ranks of the group and receive from them into blocks that are there, while the caller goes on.

    Parameters
    ----------
    grid : Grid
    axes : sequence of str
        That span the group.
    send, recv : sequence of (int, array)
        Rank of the group and a contiguous block. What one rank sends to another it receives in the same order.
    stream : int
        Messages of different streams may overtake one another.
    op : str
        What the ledger calls it.

    **Communication:** the words of `recv`. **Adjoint:** itself, send and recv swapped.
    """
    comm, begun = grid.comm(axes), ledger.clock.now()
    landings = [(_into(block, grid), block) for _, block in recv]
    requests = []
    for (source, _), (buffer, _) in zip(recv, landings, strict=True):
        requests += [comm.Irecv([m, mpi_type(m.dtype)], source, _TAG + stream) for m in messages(buffer.reshape(-1))]
    sent = [outgoing(block, grid) for _, block in send]
    for (to, _), buffer in zip(send, sent, strict=True):
        requests += [comm.Isend([m, mpi_type(m.dtype)], to, _TAG + stream) for m in messages(buffer)]
    words = sum(block.size for _, block in recv)
    itemsize = backend.numpy_dtype(recv[0][1].dtype).itemsize if recv else 0
    due = ledger.clock.arrival(op, axes, words * itemsize)
    entry = _Entry(op, grid.ordered(axes), words, itemsize, begun, ledger.clock.now(), due, ledger.site())
    return Pending(requests, sent, landings, entry)


def progress(grid: Grid) -> None:
    """Let MPI get on with what is under way: many move large messages only while they are called."""
    grid.comm(tuple(grid.axes)).Iprobe(MPI.ANY_SOURCE, _TAG)


def _into(block: Block, grid: Grid) -> Any:
    """Return the buffer that MPI writes for `block`: its own memory if MPI can write there, else one to copy from."""
    device = backend.device_of(block)
    own = type(block) is np.ndarray if device is None else grid.awareness.aware
    if not own or backend.is_half(block.dtype):
        return landing(block, block.size, grid)
    if device is not None:
        device.synchronize()  # a kernel may still read what lay there before
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

    All ranks get None if one block does not lie in shareable memory and cannot be lent. No rank leaves before all have
    read.

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
    lend : bool
        Copy a block outside the shareable memory into it; if false, such a block makes all ranks get None.
    leaf : bool
        Nothing is communicated inside the context: an exception in it leaves no rank waiting.
    """
    group, begun = grid.comm(axes), ledger.clock.now()
    memories = grid.peers(axes)
    assert memories is not None, "the ranks of this group cannot read each other's memory"
    lent = shared_memory.lend(block) if lend else block
    told = np.empty((group.size, 1 + block.ndim), np.int64)
    group.Allgather(np.array(shared_memory.describe(lent), np.int64), told)
    if min(told[:, 0]) < 0:
        yield None
        return
    ledger.post("read", grid.ordered(axes), words, block.dtype.itemsize, begun)
    read = leaf
    try:
        yield [
            lent if rank == group.rank else shared_memory.view(memory, shape, block.dtype, where)
            for rank, (memory, shape, where) in enumerate(zip(memories, shapes, told.tolist(), strict=True))
        ]
        read = True
    finally:
        if read:
            group.Barrier()
