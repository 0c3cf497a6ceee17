"""The measurement of a machine, by the ranks of a grid and within a second.

`measure` returns a `Machine`, whose rates hold while all ranks do the same. `measure_flops` is its rate of products
alone, by which training runs divide their flop (MFU). `measure_pair` and `measure_allreduce` measure links while
nothing else goes on, as the doctor shows them. All of them are collective. ``apps.planning`` calls `measure` and
replaces the overheads by the overheads of a training step's layers.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import comm
from colossal_mpi.grid import Grid
from colossal_mpi.machine.model import FREE_LINK, Link, Machine
from colossal_mpi.platform import backend, blas
from colossal_mpi.platform.backend import Block

_ROUNDS = 5
_LARGE = 1 << 20
"""Elements of an array so large that computing with it and sending it take the time of its bytes."""
_TINY, _CALLS = 8, 100
"""Elements of an array so small that an operation takes the time of the call, and calls in one round."""
_BETWEEN = 10
"""Small messages in one round, each after a computation."""

_LARGEST_PRODUCT, _LONG_ENOUGH = 8192, 4e-3
"""Size of the largest square product that is tried, and seconds from which on a product gives the rate."""
_PRODUCT_ROUNDS, _PRODUCT_SECONDS = 2, 0.05

_SMALL_MESSAGE, _LARGE_MESSAGE = 8, 4 << 20
"""Bytes of the two messages by which `measure_pair` measures latency and bandwidth."""
_TAG, _MOST_MESSAGES = 11, 2000


def measure(grid: Grid, dtype: str = "float64", flops: float = 0.0) -> Machine:
    """Return the rates of each rank of a grid while all ranks do the same.

    Parameters
    ----------
    grid : Grid
        The ranks that measure, all at once.
    dtype : str
        Dtype of the products.
    flops : float
        Flop/s of all ranks together in products, if they are known; 0 measures them.

    Returns
    -------
    Machine
        The same on all ranks: the slowest rank counts. On a single node `far` is `near`; on one rank both are
        `FREE_LINK`.

    Notes
    -----
    **Communication:** allgathers of 4 MiB from each rank over the grid and over the ranks of each node, and gathers of
    numbers. It takes about a second.

    Examples
    --------
    >>> grid = Grid(row=2, col=2)
    >>> linalg.options("mk,kn->mn", a, b, machine=measure(grid, "float64"))
    """
    world: Any = grid.comm(tuple(grid.axes))
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    sizes = comm.collect(node.size, grid)
    # All ranks measure together, whatever the size of their node; the link within a largest node counts for all.
    links = comm.collect(_link(Grid(node, grid.device.partition(":")[0], node=node.size), grid), grid)
    near = links[sizes.index(max(sizes))]
    far = near if max(sizes) == grid.size else _link(grid, grid)
    node.Free()
    rate = (flops or measure_flops(grid, dtype)) / grid.size
    call, product = _overheads(grid, dtype)
    return Machine(rate, _memory(grid), call, product, near, far, max(sizes), overlap=grid.device != "cpu")


def measure_flops(grid: Grid, dtype: str) -> float:
    """Return the rate of square products on all ranks at once, the best of some rounds.

    Ranks that share cores share their rate. A product takes some milliseconds, and the measurement a quarter of a
    second.

    Parameters
    ----------
    grid : Grid
        The ranks that multiply.
    dtype : str
        Dtype of the operands.

    Returns
    -------
    float
        Flop/s of all ranks together.

    Notes
    -----
    **Communication:** a gather of a number before and after each round.
    """
    size = _long_enough(grid, dtype)
    operands = _operands(grid, dtype, size)
    best = 0.0
    for _ in range(_PRODUCT_ROUNDS):
        comm.collect(None, grid)
        begun, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begun < _PRODUCT_SECONDS:
            _multiply(operands)
            count += 1
        counted = comm.collect((2.0 * count * size**3, time.perf_counter() - begun), grid)
        best = max(best, sum(flop for flop, _ in counted) / max(seconds for _, seconds in counted))
    return best


def _long_enough(grid: Grid, dtype: str) -> int:
    """Return the size of a square product that takes long enough to measure its rate."""
    size = 256
    while size < _LARGEST_PRODUCT:
        operands = _operands(grid, dtype, size)
        _multiply(operands)
        begun = time.perf_counter()
        _multiply(operands)
        if time.perf_counter() - begun > _LONG_ENOUGH:
            break
        size *= 2
    return size


def _operands(grid: Grid, dtype: str, size: int) -> tuple[Block, Block, Block]:
    xp = grid.xp
    kind = backend.dtype_of(xp, dtype)
    a, b = (xp.full((size, size), 1.0 / size, dtype=kind) for _ in range(2))
    wide = xp.float32 if backend.is_half(kind) else kind
    return a, b, xp.empty((size, size), dtype=wide)


def _multiply(operands: tuple[Block, Block, Block]) -> None:
    a, b, c = operands
    blas.gemm(a, b, c)
    backend.synchronize(c)


def _memory(grid: Grid) -> float:
    """Return the bytes/s of ``x + x``, which is read twice and written once."""
    x = grid.xp.ones((_LARGE,), dtype=grid.xp.float32)
    return 3 * 4 * _LARGE / median_seconds(grid, lambda: x + x)


def _overheads(grid: Grid, dtype: str) -> tuple[float, float]:
    """Return the seconds of an operation on a tiny array, and the additional seconds of a tiny product."""
    x, operands = grid.xp.ones((_TINY,), dtype=grid.xp.float32), _operands(grid, dtype, _TINY)

    def product() -> Block:
        a, b, c = operands
        blas.gemm(a, b, c)
        return c

    call = median_seconds(grid, lambda: x + x, _CALLS)
    return call, max(0.0, median_seconds(grid, product, _CALLS) - call)


def _link(group: Grid, grid: Grid) -> Link:
    """Return the link of a group, measured by allgathers in it while the other groups of a grid do the same.

    Small messages come between computations, as in a program: ranks that share cores have to wait for their turn.
    """
    axes, ranks, xp = tuple(group.axes), group.size, group.xp
    x = xp.ones((_LARGE,), dtype=xp.float32)

    def gather(count: int) -> Callable[[], Block]:
        own = xp.ones((count,), dtype=xp.float32)
        # x[N_group] -> x[N]: allgather over the group
        return lambda: comm.allgather(own, group, axes, [count] * ranks)

    def compute_and_send() -> Block:
        y = x * x
        small()
        return y

    small = gather(1)
    late = max(0.0, median_difference(grid, compute_and_send, lambda: x * x, _BETWEEN))
    large = median_seconds(grid, gather(_LARGE))
    return Link(late / math.ceil(math.log2(ranks)), 4 * _LARGE * (ranks - 1) / large) if ranks > 1 else FREE_LINK


def median_seconds(grid: Grid, action: Callable[[], Any], times: int = 1) -> float:
    """Return the median time of an action that all ranks do at once.

    Parameters
    ----------
    grid : Grid
        The ranks that act.
    action : callable
        Does the action, and returns a block that is ready when the action is over.
    times : int
        The number of times that the action is done in a round.

    Returns
    -------
    float
        Seconds of one action on the slowest rank, the median of five rounds.

    Notes
    -----
    **Communication:** a gather of a number before and after each round.
    """
    action()
    return statistics.median(_round(grid, action, times) for _ in range(_ROUNDS))


def median_difference(grid: Grid, action: Callable[[], Any], other: Callable[[], Any], times: int) -> float:
    """Return by how much one action takes longer than another, while both take turns.

    Parameters
    ----------
    grid : Grid
        The ranks that act.
    action, other : callable
        Do the actions, and return blocks that are ready when the actions are over.
    times : int
        The number of times that each action is done in a round.

    Returns
    -------
    float
        Seconds, the median of eleven rounds; below 0 if `action` is faster.

    Notes
    -----
    **Communication:** a gather of a number before and after each round.
    """
    action()
    other()
    rounds = range(2 * _ROUNDS + 1)
    return statistics.median(_round(grid, action, times) - _round(grid, other, times) for _ in rounds)


def _round(grid: Grid, action: Callable[[], Any], times: int) -> float:
    """Return the seconds of one action on the slowest rank."""
    comm.collect(None, grid)
    begun = time.perf_counter()
    for _ in range(times):
        last = action()
    backend.synchronize(last)
    slowest: float = max(comm.collect((time.perf_counter() - begun) / times, grid))
    return slowest


def measure_pair(world: MPI.Comm, other: int, seconds: float) -> Link:
    """Return the link between rank 0 and another rank, by messages that go there and back.

    Parameters
    ----------
    world : mpi4py.MPI.Comm
        A communicator, all of whose ranks call; ranks other than the two sleep.
    other : int
        The rank that answers rank 0.
    seconds : float
        Time to spend.

    Returns
    -------
    Link
        Latency of 8 bytes and bandwidth of 4 MiB in host memory, one way, on rank 0; `FREE_LINK` on the other ranks.

    Notes
    -----
    **Communication:** messages between the two ranks, as many as there is time for.
    """
    latency, large = (_ping(world, other, size, seconds / 2) for size in (_SMALL_MESSAGE, _LARGE_MESSAGE))
    return Link(latency, _LARGE_MESSAGE / large) if world.rank == 0 else FREE_LINK


def _ping(world: MPI.Comm, other: int, size: int, seconds: float) -> float:
    """Return the median seconds of a message one way between rank 0 and another; 1 on all ranks but rank 0."""
    buffer, result = np.zeros(size, np.uint8), 1.0
    if world.rank == 0:

        def round_trip() -> None:
            world.Send(buffer, other, _TAG)
            world.Recv(buffer, other, _TAG)

        result = _repeated(round_trip, seconds, lambda count: world.send(count, other, _TAG)) / 2
    elif world.rank == other:

        def answer() -> None:
            world.Recv(buffer, 0, _TAG)
            world.Send(buffer, 0, _TAG)

        _repeated(answer, seconds, lambda _: world.recv(source=0, tag=_TAG))
    _sleep_until_all_come(world)
    return result


def measure_allreduce(world: MPI.Intracomm, seconds: float) -> Link:
    """Return the latency and bandwidth of an allreduce over all ranks.

    Parameters
    ----------
    world : mpi4py.MPI.Intracomm
        The ranks, at least two of them.
    seconds : float
        Time to spend.

    Returns
    -------
    Link
        Seconds of an allreduce of 8 bytes, and bytes/s that each rank sends in one of 4 MiB, ``2 (p - 1) / p n``.

    Notes
    -----
    **Communication:** MPI's allreduce over all ranks, as often as there is time for.
    """
    latency, large = (_allreduce(world, size, seconds / 2) for size in (_SMALL_MESSAGE, _LARGE_MESSAGE))
    return Link(latency, 2 * (world.size - 1) / world.size * _LARGE_MESSAGE / large)


def _allreduce(world: MPI.Intracomm, size: int, seconds: float) -> float:
    """Return the median seconds of an allreduce of `size` bytes."""
    own, total = np.zeros(size // 8), np.empty(size // 8)
    # x[N] {U_world} -> x[N]: allreduce over all ranks
    return _repeated(lambda: world.Allreduce(own, total), seconds, world.bcast)


def _repeated(action: Callable[[], None], seconds: float, agree: Callable[[int], int | None]) -> float:
    """Return the median seconds of an action, done as often as there is time for; `agree` sends rank 0's count."""
    first = [_seconds(action) for _ in range(3)]
    count = int(min(max(seconds / max(*first, 1e-7), 3), _MOST_MESSAGES))
    agreed = agree(count)
    return statistics.median(_seconds(action) for _ in range(count if agreed is None else agreed))


def _seconds(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _sleep_until_all_come(world: MPI.Comm) -> None:
    """Wait for all ranks without taking a core from the ranks that are measuring."""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(0.001)
