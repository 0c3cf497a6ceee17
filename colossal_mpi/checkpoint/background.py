"""Checkpoints that are written while their arrays are being changed.

A thread of each rank copies the blocks, and writes the copies; the caller waits for the copying, at the place where it
would change the arrays, and for nothing else. In training that is the step of the optimizer: the forward and backward
pass before it read the weights as the thread does, which hides the copying behind them [1]_. MPI is called by
the caller's thread alone.

References
----------
.. [1] J. Mohan, A. Phanishayee and V. Chidambaram, CheckFreq: Frequent, Fine-Grained DNN Checkpointing, FAST 2021.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from colossal_mpi import comm
from colossal_mpi.checkpoint.entries import owned
from colossal_mpi.checkpoint.writing import Told, Writing
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, ColossalError
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend


class AsyncCheckpointer:
    """Saves one checkpoint at a time, on a thread.

    All methods are collective, and called by the main thread, except `settle`, which is local. Errors of any rank's
    thread are raised on all ranks by one of the next two `poll`, or by `begin` or `finish`; nothing is left of that
    checkpoint then.

    Parameters
    ----------
    grid : Grid

    Attributes
    ----------
    stalled : float
        Seconds that the caller has spent in these methods.

    Notes
    -----
    **Memory:** a copy of the blocks that this rank owns, in host memory, taken by `reserve` or for the first checkpoint
    and kept for the next ones. `save` needs none.

    Examples
    --------
    >>> saving = AsyncCheckpointer(grid)
    >>> saving.reserve(arrays)
    >>> saving.begin("step-1", arrays, {"step": 1})
    >>> compute_gradients()  # reads the arrays
    >>> saving.settle()
    >>> update_arrays()
    >>> saving.poll()
    >>> saving.finish()
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.stalled = grid, 0.0
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._copies: dict[str, np.ndarray] = {}
        self._kinds: dict[str, _Kind] = {}
        self._job: _Job | None = None

    def begin(
        self,
        directory: str | Path,
        arrays: Mapping[str, DistArray],
        metadata: Mapping[str, Any],
        *,
        values: Mapping[str, tuple[Any, str]] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Start to save, as `save` does, after the checkpoint before is whole.

        Parameters
        ----------
        directory, arrays, metadata, values
            As of `save`.
        after : callable, optional
            What rank 0's thread does when the checkpoint is whole.
        """
        self.finish()
        with self._timed():
            writing = Writing(Path(directory), arrays, metadata, self.grid, values or {})
            blocks = writing.blocks()
            hosts = {name: block for name, block in blocks.items() if backend.device_of(block) is None}
            try:
                with comm.agreed(self.grid, CheckpointError):
                    self._reserve(blocks)
                    # A GPU's current stream belongs to this thread: its blocks are copied here, at once.
                    self._copy({name: block for name, block in blocks.items() if name not in hosts})
            except ColossalError:
                writing.discard()
                raise
            copied = self._pool.submit(self._copy, hosts)
            written = self._pool.submit(self._write, writing, list(blocks), copied)
            self._job = _Job(writing, after, copied, written)

    def reserve(self, arrays: Mapping[str, DistArray]) -> None:
        """Take the memory for copies of some arrays now, on the thread, which the first `begin` would do else.

        The system zeroes each page when it is first written to, and a virtual machine may have to get it from its host:
        the first copy to it takes many times as long as the next ones, longer than a step can hide.

        Raises
        ------
        CheckpointError
            On all ranks, if a rank has no memory.
        """
        self.finish()
        with self._timed(), comm.agreed(self.grid, CheckpointError):
            if self._reserve({name: array.local for name, array in arrays.items() if owned(array)}):
                self._pool.submit(self._touch)

    def _reserve(self, blocks: Mapping[str, Any]) -> bool:
        """Have room for copies of some blocks; say whether it is new."""
        kinds = {name: (tuple(block.shape), backend.numpy_dtype(block.dtype)) for name, block in blocks.items()}
        if kinds == self._kinds:
            return False
        self._copies, self._kinds = {}, {}  # what there was is freed first
        self._copies, self._kinds = _room(kinds), kinds
        return True

    def _touch(self) -> None:
        for kept in self._copies.values():
            kept.fill(0)

    def _copy(self, blocks: Mapping[str, Any]) -> None:
        for name, block in blocks.items():
            np.copyto(self._copies[name], backend.to_host(block))

    def _write(self, writing: Writing, names: list[str], copied: Future[None]) -> Told | None:
        copied.result()
        return writing.write({name: self._copies[name] for name in names})

    def settle(self) -> None:
        """Wait until the arrays may be changed."""
        with self._timed():
            if self._job is not None:
                self._job.copied.exception()  # waits; what failed is said when all ranks can

    def poll(self) -> None:
        """Move on with what needs all ranks. Call it once for each step of the caller.

        It asks whether the others have done their part, and learns it when it is called next, so that it waits for
        none: not for one that is late with its step, either.
        """
        with self._timed():
            if self._job is not None and all(self._job.answers() or [False]):
                self._advance(self._job)
            if self._job is not None:
                self._job.ask(self.grid)

    def finish(self) -> None:
        """Wait until the checkpoint is whole."""
        with self._timed():
            while self._job is not None:
                self._job.answers()
                self._job.now.exception()
                self._advance(self._job)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stalled += time.perf_counter() - begun

    def _advance(self, job: _Job) -> None:
        """Go to the next stage, after all ranks have done the present one."""
        try:
            with comm.agreed(self.grid, CheckpointError):
                outcome = job.now.result()
            if job.closed is None:
                told = comm.collect(outcome, self.grid)
                job.closed = self._pool.submit(job.writing.close, told, job.after)
            else:
                self._job = None
        except ColossalError:
            self._job = None
            job.writing.discard()
            raise


_Kind: TypeAlias = tuple[tuple[int, ...], np.dtype]
_LINE = 64  # bytes: where copies begin


def _room(kinds: Mapping[str, _Kind]) -> dict[str, np.ndarray]:
    """Return arrays of some shapes and dtypes, in one piece of memory.

    One large piece comes in huge pages, where the system has them, and many small ones do not: the first copy to 4 KiB
    pages takes four times as long.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items()}
    starts = list(accumulate((-(-size // _LINE) * _LINE for size in sizes.values()), initial=0))
    whole = np.empty(starts[-1], np.uint8)
    return {
        name: whole[start : start + sizes[name]].view(dtype).reshape(shape)
        for start, (name, (shape, dtype)) in zip(starts, kinds.items(), strict=False)
    }


class _Job:
    """A checkpoint under way, in two stages: the blocks of each rank, then what describes all of them."""

    def __init__(
        self,
        writing: Writing,
        after: Callable[[], None] | None,
        copied: Future[None],
        written: Future[Told | None],
    ) -> None:
        self.writing, self.after, self.copied, self.written = writing, after, copied, written
        self.closed: Future[None] | None = None
        self._answers: Callable[[], list[int]] | None = None

    def ask(self, grid: Grid) -> None:
        """Begin to ask all ranks whether they have done this stage."""
        self._answers = comm.collect_later(self.now.done(), grid)

    def answers(self) -> list[int]:
        """Wait for the answers to what was asked last; none, if nothing was."""
        wait, self._answers = self._answers, None
        return wait() if wait else []

    @property
    def now(self) -> Future[Any]:
        """The stage that is under way."""
        return self.written if self.closed is None else self.closed
