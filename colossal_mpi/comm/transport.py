"""Two transports for collectives: MPI's blocking calls, and nonblocking messages.

`colossal_mpi.redistribution` writes each step of a plan once, as a generator that yields the transfers it has to wait
for; the transport decides whether a transfer is over when it returns or still under way. Both call
`colossal_mpi.comm.collectives` and `colossal_mpi.comm.messages`, and both add terms in the order of the ranks, so that
a result has the same bits either way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate
from typing import ClassVar, Generic, TypeAlias, TypeVar

from colossal_mpi.comm import check
from colossal_mpi.comm.collectives import (
    SUM,
    add_in_rank_order,
    all_to_all,
    allgather,
    cast,
    reduce_scatter,
    require_reducible,
    widened,
)
from colossal_mpi.comm.messages import Pending, start_exchange
from colossal_mpi.grid import Grid
from colossal_mpi.layout import part
from colossal_mpi.platform import backend
from colossal_mpi.platform.backend import Block

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Request(ABC, Generic[T_co]):
    """Communication under way that has a result in the end."""

    @abstractmethod
    def done(self) -> bool:
        """Return whether the result is there, without waiting.

        Returns
        -------
        bool
            True if `wait` returns at once.
        """

    @abstractmethod
    def wait(self) -> T_co:
        """Wait for the result and return it.

        Returns
        -------
        object
            The result.
        """


Steps: TypeAlias = Generator[Request[Block], Block, T]
"""A computation that yields each request whose block it needs, and is sent that block."""


class Completed(Request[T]):
    """A request whose result is there."""

    def __init__(self, result: T) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def wait(self) -> T:
        return self._result


class _Received(Request[Block]):
    """A request for the block that `finish` makes when an exchange of messages is over."""

    def __init__(self, exchange: Pending, finish: Callable[[], Block]) -> None:
        self._exchange, self._finish = exchange, finish

    def done(self) -> bool:
        return self._exchange.done()

    def wait(self) -> Block:
        self._exchange.wait()
        return self._finish()


class Started(Request[T]):
    """Steps under way, as a request for their result.

    A step that follows messages which have come is taken when `done` or `wait` is called.

    Parameters
    ----------
    steps : generator
        The steps, which begin at once.
    """

    def __init__(self, steps: Steps[T]) -> None:
        self._steps, self._result = steps, list[T]()
        self._request: Request[Block] | None = None
        self._advance(lambda: next(steps))

    def _advance(self, step: Callable[[], Request[Block]]) -> None:
        try:
            self._request = step()
        except StopIteration as end:
            self._request = None
            self._result = [end.value]

    def _resume(self) -> None:
        request, self._request = self._request, None
        assert request is not None
        block = request.wait()
        del request  # frees its buffers before the next step
        self._advance(lambda: self._steps.send(block))

    def done(self) -> bool:
        while self._request is not None and self._request.done():
            self._resume()
        return self._request is None

    def wait(self) -> T:
        while self._request is not None:
            self._resume()
        return self._result[0]


class Announced(Request[T]):
    """A request for the result of a checked call: its end is the first to compare the records of the ranks.

    Parameters
    ----------
    call : Call
        The call, whose record is on its way.
    request : Request
        The request for its result.
    """

    def __init__(self, call: check.Call, request: Request[T]) -> None:
        self._call, self._request = call, request

    def done(self) -> bool:
        if not self._call.done():
            return False
        self._call.end()
        return self._request.done()

    def wait(self) -> T:
        self._call.end()
        return self._request.wait()


class Transport(ABC):
    """A group of ranks and a way to move flat blocks between them; its requests give flat blocks.

    Parameters
    ----------
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.

    Attributes
    ----------
    blocking : bool
        Whether its requests are completed when they are made.
    rank, size : int
        This rank in the group, and the number of ranks.
    """

    blocking: ClassVar[bool]

    def __init__(self, grid: Grid, axes: Sequence[str]) -> None:
        self._grid, self._axes = grid, axes
        group = grid.comm(axes)
        self.rank, self.size = group.rank, group.size

    @abstractmethod
    def allgather(self, own: Block, counts: Sequence[int], starts: Sequence[int] | None = None) -> Request[Block]:
        """Bring the blocks of all ranks to all ranks, as `comm.allgather` does.

        Parameters
        ----------
        own : array
            This rank's flat block, of ``counts[rank]`` elements.
        counts : sequence of int
            The elements of each rank's block.
        starts : sequence of int, optional
            Where each rank's block starts in the result; one after the other by default.

        Returns
        -------
        Request
            A request for the blocks of all ranks, ``[sum(counts)]``.
        """

    @abstractmethod
    def all_to_all(self, block: Block, counts: Sequence[int], recv_counts: Sequence[int], most: int) -> Request[Block]:
        """Send piece r of a block to rank r, as `comm.all_to_all` does.

        Parameters
        ----------
        block : array
            The pieces for rank 0, 1, ... one after the other, ``[sum(counts)]``.
        counts : sequence of int
            The elements that this rank sends to each rank.
        recv_counts : sequence of int
            The elements that this rank receives from each rank.
        most : int
            A bound on the elements that any rank sends or receives in all.

        Returns
        -------
        Request
            A request for the pieces from rank 0, 1, ... one after the other, ``[sum(recv_counts)]``.
        """

    @abstractmethod
    def reduce_scatter(self, block: Block, counts: Sequence[int], op: str = SUM) -> Request[Block]:
        """Sum piece r of all ranks on rank r, as `comm.reduce_scatter` does.

        Parameters
        ----------
        block : array
            The pieces of rank 0, 1, ... one after the other, ``[sum(counts)]``.
        counts : sequence of int
            The elements of each rank's piece.
        op : {"sum", "max"}
            The reduction.

        Returns
        -------
        Request
            A request for this rank's piece, ``[counts[rank]]``.
        """

    @abstractmethod
    def allreduce(self, block: Block) -> Request[Block]:
        """Sum the blocks of all ranks on all ranks, as `comm.allreduce` does.

        Parameters
        ----------
        block : array
            This rank's flat term.

        Returns
        -------
        Request
            A request for the sum, of the shape of `block`.
        """


class BlockingTransport(Transport):
    """The transport of MPI's blocking calls, in the group that some axes of a grid span.

    Parameters
    ----------
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    """

    blocking = True

    def allgather(self, own: Block, counts: Sequence[int], starts: Sequence[int] | None = None) -> Request[Block]:
        return Completed(allgather(own, self._grid, self._axes, counts, starts))

    def all_to_all(self, block: Block, counts: Sequence[int], recv_counts: Sequence[int], most: int) -> Request[Block]:
        return Completed(all_to_all(block, self._grid, self._axes, counts, recv_counts, most))

    def reduce_scatter(self, block: Block, counts: Sequence[int], op: str = SUM) -> Request[Block]:
        return Completed(reduce_scatter(block, self._grid, self._axes, counts, op))

    def allreduce(self, block: Block) -> Request[Block]:
        return Completed(allreduce(block, self._grid, self._axes))


class MessageTransport(Transport):
    """The transport of nonblocking messages from rank to rank, in the group that some axes of a grid span.

    Every rank of the group makes its transports in the same order: each takes the next two streams of messages.

    Parameters
    ----------
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    """

    blocking = False

    def __init__(self, grid: Grid, axes: Sequence[str]) -> None:
        super().__init__(grid, axes)
        self._stream = _FIRST + 2 * grid.next_number(axes) % _STREAMS

    def _start(self, op: str, send: Sequence[Block], recv: Sequence[Block]) -> Pending:
        others = [r for r in range(self.size) if r != self.rank]
        stream, self._stream = self._stream, self._stream + 1
        to, source = [(r, send[r]) for r in others], [(r, recv[r]) for r in others]
        return start_exchange(self._grid, self._axes, to, source, stream, op)

    def allgather(self, own: Block, counts: Sequence[int], starts: Sequence[int] | None = None) -> Request[Block]:
        whole = backend.empty_like(own, (sum(counts),))
        places = pieces_of(whole, counts, starts)
        places[self.rank][...] = own
        return _Received(self._start("allgather", [own] * self.size, places), lambda: whole)

    def all_to_all(self, block: Block, counts: Sequence[int], recv_counts: Sequence[int], most: int) -> Request[Block]:
        sent, whole = pieces_of(block, counts), backend.empty_like(block, (sum(recv_counts),))
        places = pieces_of(whole, recv_counts)
        places[self.rank][...] = sent[self.rank]
        return _Received(self._start("all_to_all", sent, places), lambda: whole)

    def reduce_scatter(self, block: Block, counts: Sequence[int], op: str = SUM) -> Request[Block]:
        require_reducible(op, block)
        dtype, pieces = block.dtype, pieces_of(widened(block), counts)
        own = pieces[self.rank]
        terms = [own if r == self.rank else backend.empty_like(own, own.shape) for r in range(self.size)]

        def finish() -> Block:
            return cast(add_in_rank_order(terms, backend.empty_like(own, own.shape), op), dtype)

        return _Received(self._start("reduce_scatter", pieces, terms), finish)

    def allreduce(self, block: Block) -> Request[Block]:
        return Started(_allreduce(block, self))


_FIRST, _STREAMS = 16, 1 << 13
"""The first stream of messages of these transports, and how many there are: more are never under way in one group."""


def allreduce(block: Block, grid: Grid, axes: Sequence[str], op: str = SUM) -> Block:
    """Return the sum (or maximum) of the blocks of a group on every rank, bitwise equal on all of them.

    It is a reduce_scatter and an allgather, so that each element is summed once, by one rank. Two ranks swap their
    blocks instead, which moves the same words in one message and gives the same bits, since both add the blocks in the
    order of the ranks.

    Parameters
    ----------
    block : array
        This rank's term, of any shape.
    grid : Grid
        The grid.
    axes : sequence of str
        The axes that span the group.
    op : {"sum", "max"}
        The reduction.

    Returns
    -------
    array
        The sum, of the shape and dtype of `block`; the block itself in a group of one rank.

    Raises
    ------
    DTypeError
        If the elements have no such reduction, or MPI has no type for them.

    Notes
    -----
    **Communication:** a reduce_scatter and an allgather over `axes`, ``(p - 1) own + n - own`` words received, own
    being a 1/p part. **Adjoint:** itself.

    Examples
    --------
    >>> total = comm.allreduce(losses, grid, ("data",))
    """
    if grid.extent(axes) == 1:
        return block
    require_reducible(op, block)
    xp = backend.namespace(block)
    with check.call("allreduce", grid, axes, reduction=op, dtype=block.dtype, shape=tuple(block.shape)):
        flat = Started(_allreduce(xp.reshape(block, (-1,)), BlockingTransport(grid, axes), op)).wait()
    return xp.reshape(flat, block.shape)


def _allreduce(flat: Block, group: Transport, op: str = SUM) -> Steps[Block]:
    n, p, dtype = flat.shape[0], group.size, flat.dtype
    if p == 2:
        # X[n] {U_axes} -> X[2, n] on both ranks, which add it
        both = widened((yield group.allgather(flat, [n, n])))
        return cast(add_in_rank_order(pieces_of(both, [n, n]), backend.empty_like(both, (n,)), op), dtype)
    counts = [stop - start for start, stop in (part(n, p, rank) for rank in range(p))]
    # X[n] {U_axes} -> X[n_axes] -> X[n]: reduce_scatter, then allgather
    own = yield group.reduce_scatter(flat, counts, op)
    del flat
    return (yield group.allgather(own, counts))


def pieces_of(flat: Block, counts: Sequence[int], starts: Sequence[int] | None = None) -> list[Block]:
    """Return the pieces of a flat block as views.

    Parameters
    ----------
    flat : array
        A flat block.
    counts : sequence of int
        The elements of each piece.
    starts : sequence of int, optional
        Where each piece starts; one after the other by default.

    Returns
    -------
    list of array
        The pieces.
    """
    places = [0, *accumulate(counts)] if starts is None else starts
    return [flat[start : start + count] for start, count in zip(places, counts, strict=False)]
