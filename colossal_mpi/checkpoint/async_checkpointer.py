"""Save checkpoints on a thread while their arrays are being changed.

The trainer and ``bench checkpoint`` of ``apps`` use `AsyncCheckpointer`, which runs the steps of
`colossal_mpi.checkpoint.saving.CheckpointWriter`. A thread of each rank copies the blocks and writes the copies. The
caller waits only for the copying, and only at the place where it would change the arrays. In training this place is the
step of the optimizer: the forward and backward pass before it only read the weights, as the thread does, and hide the
copying [1]_. Only the caller's thread calls MPI.

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
from colossal_mpi.checkpoint.saving import CheckpointWriter, WrittenFile, owned
from colossal_mpi.distarray import DistArray
from colossal_mpi.errors import CheckpointError, ColossalError
from colossal_mpi.grid import Grid
from colossal_mpi.platform import Block, backend


class AsyncCheckpointer:
    """Saves one checkpoint at a time, on a thread.

    All methods are collective and called by the main thread, except `settle`, which is local. If a thread fails on any
    rank, all ranks raise its error: in one of the next two calls of `poll`, or in `begin` or `finish`. Nothing is left
    of that checkpoint then.

    Parameters
    ----------
    grid : Grid
        The grid whose ranks save together.

    Attributes
    ----------
    stalled : float
        Seconds that the caller has spent in these methods.

    Notes
    -----
    **Memory:** a copy of the blocks that this rank owns, in host memory. `reserve` or the first checkpoint allocates
    it, and later checkpoints use it again. `save` needs no such copy.

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
        self._specs: dict[str, _Spec] = {}
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
        """Finish the previous checkpoint, then start to save a new one.

        Parameters
        ----------
        directory : str or Path
            The new directory; it must not exist.
        arrays : mapping of str to DistArray
            The arrays by name, as `save` takes them. They must not change before `settle` returns.
        metadata : mapping
            Anything that JSON can hold.
        values : mapping of str to (value, units), optional
            Values beside the arrays, as `save` takes them.
        after : callable, optional
            A function that rank 0's thread calls when the checkpoint has its final name.

        Raises
        ------
        CheckpointError
            On all ranks, if the arrays cannot be saved, if a rank has no memory for the copies, or if the previous
            checkpoint failed.

        Notes
        -----
        **Communication:** small messages only.
        """
        self.finish()
        with self._timed():
            writer = CheckpointWriter(Path(directory), arrays, metadata, self.grid, values or {})
            blocks = writer.blocks()
            on_host = {name: block for name, block in blocks.items() if backend.device_of(block) is None}
            try:
                with comm.agreed(self.grid, CheckpointError):
                    self._allocate(blocks)
                    # A GPU's current stream belongs to this thread: its blocks are copied here, at once.
                    self._copy({name: block for name, block in blocks.items() if name not in on_host})
            except ColossalError:
                writer.discard()
                raise
            copied = self._pool.submit(self._copy, on_host)
            written = self._pool.submit(self._write, writer, list(blocks), copied)
            self._job = _Job(writer, after, copied, written)

    def reserve(self, arrays: Mapping[str, DistArray]) -> None:
        """Allocate the memory for copies of some arrays now, which the first `begin` would do otherwise.

        The system zeroes each page when it is first written, and a virtual machine may have to get it from its host.
        The first copy takes many times as long as the next ones, longer than a training step can hide. A thread
        therefore writes every page ahead of the first checkpoint.

        Parameters
        ----------
        arrays : mapping of str to DistArray
            The arrays by name, as `begin` will take them.

        Raises
        ------
        CheckpointError
            On all ranks, if a rank has no memory.

        Notes
        -----
        **Communication:** small messages only.
        """
        self.finish()
        with self._timed(), comm.agreed(self.grid, CheckpointError):
            if self._allocate({name: array.local for name, array in arrays.items() if owned(array)}):
                self._pool.submit(self._touch_pages)

    def _allocate(self, blocks: Mapping[str, Block]) -> bool:
        """Allocate copies of some blocks, unless those that exist fit; return whether they are new."""
        specs = {name: (tuple(block.shape), backend.numpy_dtype(block.dtype)) for name, block in blocks.items()}
        if specs == self._specs:
            return False
        self._copies, self._specs = {}, {}  # frees the old copies before the new ones are allocated
        self._copies, self._specs = _empty_copies(specs), specs
        return True

    def _touch_pages(self) -> None:
        for copy in self._copies.values():
            copy.fill(0)

    def _copy(self, blocks: Mapping[str, Block]) -> None:
        for name, block in blocks.items():
            np.copyto(self._copies[name], backend.to_host(block))

    def _write(self, writer: CheckpointWriter, names: list[str], copied: Future[None]) -> WrittenFile | None:
        copied.result()
        return writer.write({name: self._copies[name] for name in names})

    def settle(self) -> None:
        """Wait until the arrays are copied and may be changed, without communication."""
        with self._timed():
            if self._job is not None:
                self._job.copied.exception()  # waits; an error is raised later, by all ranks together

    def poll(self) -> None:
        """Advance the checkpoint where all ranks are needed; call it once for each step of the caller.

        A call asks whether the other ranks have done their part, and the next call takes the answers. No call waits for
        another rank's thread, nor for a rank that is late with its step.

        Notes
        -----
        **Communication:** a nonblocking allgather of one number for each rank, begun here and completed by the next
        call; small messages when all ranks have done their part.
        """
        with self._timed():
            if self._job is not None and all(self._job.answers() or [False]):
                self._advance(self._job)
            if self._job is not None:
                self._job.ask(self.grid)

    def finish(self) -> None:
        """Wait until the checkpoint has its final name.

        Notes
        -----
        **Communication:** small messages only.
        """
        with self._timed():
            while self._job is not None:
                self._job.answers()
                self._job.current.exception()
                self._advance(self._job)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stalled += time.perf_counter() - begun

    def _advance(self, job: _Job) -> None:
        """Go to the next stage, after all ranks have done the current one."""
        try:
            with comm.agreed(self.grid, CheckpointError):
                outcome = job.current.result()
            if job.published is None:
                written = comm.collect(outcome, self.grid)
                job.published = self._pool.submit(job.writer.publish, written, job.after)
            else:
                self._job = None
        except ColossalError:
            self._job = None
            job.writer.discard()
            raise


_Spec: TypeAlias = tuple[tuple[int, ...], np.dtype]
_ALIGNMENT = 64  # bytes: where each copy begins


def _empty_copies(specs: Mapping[str, _Spec]) -> dict[str, np.ndarray]:
    """Return uninitialised arrays of some shapes and dtypes, in one piece of memory.

    The system backs one large piece with huge pages, where it has them, and many small pieces with pages of 4 KiB, on
    which the first copy takes four times as long.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in specs.items()}
    starts = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes.values()), initial=0))
    memory = np.empty(starts[-1], np.uint8)
    return {
        name: memory[start : start + sizes[name]].view(dtype).reshape(shape)
        for start, (name, (shape, dtype)) in zip(starts, specs.items(), strict=False)
    }


class _Job:
    """A checkpoint in progress, in two stages: all ranks write their blocks, then rank 0 publishes the directory."""

    def __init__(
        self,
        writer: CheckpointWriter,
        after: Callable[[], None] | None,
        copied: Future[None],
        written: Future[WrittenFile | None],
    ) -> None:
        self.writer, self.after, self.copied, self.written = writer, after, copied, written
        self.published: Future[None] | None = None
        self._answers: Callable[[], list[int]] | None = None

    def ask(self, grid: Grid) -> None:
        """Begin to ask all ranks whether they have done the current stage."""
        self._answers = comm.collect_later(self.current.done(), grid)

    def answers(self) -> list[int]:
        """Wait for the answers to the last question; return none if there was no question."""
        wait, self._answers = self._answers, None
        return wait() if wait else []

    @property
    def current(self) -> Future[Any]:
        """The stage that is in progress."""
        return self.written if self.published is None else self.published
