"""A state that is saved and loaded, in turns with plain writing and reading of the same bytes."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from colossal_mpi import checkpoint, zeros
from colossal_mpi.apps.bench import disk, timing
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout

_ARRAYS, _COLUMNS = 48, 1024
_TOKENS = 128  # of a step
_STEPS = 2  # without a checkpoint, to compare with


@dataclass
class Turn:
    """Something to time, the same on all ranks."""

    name: str
    prepare: Callable[[], None]
    work: Callable[[], None]
    against: str | None = None
    """The turn whose speed it is compared with."""
    seconds: list[float] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    """Bytes of memory that it took, of all ranks together."""
    fetched: list[int] = field(default_factory=list)
    """Bytes that came from the disk."""

    def take(self) -> None:
        """Do it once."""
        self.prepare()
        rest, before = disk.resident(), disk.read_from_disk()
        self.seconds.append(timing.timed(self.work, MPI.COMM_WORLD))
        told = MPI.COMM_WORLD.allgather((disk.peak() - rest, disk.read_from_disk() - before))
        self.extra.append(sum(extra for extra, _ in told))
        self.fetched.append(sum(fetched for _, fetched in told))


class Saving:
    """A state cut over all ranks.

    Parameters
    ----------
    size : float
        GiB of all ranks together.
    directory : Path
        Made anew.
    """

    def __init__(self, size: float, directory: Path) -> None:
        self.grid, self.directory = Grid(None, "cpu", row=MPI.COMM_WORLD.size), directory
        shape = (max(1, round(size * 2**30 / _ARRAYS / _COLUMNS / 4)), _COLUMNS)
        names = [f"weights/{i:03}" for i in range(_ARRAYS)]
        self.state = {name: zeros(shape, self.grid, Layout("row", None), "float32") for name in names}
        self.bytes = sum(4 * array.size for array in self.state.values())
        self.blocks = [np.asarray(array.local) for array in self.state.values()]
        for i, block in enumerate(self.blocks):
            block[...] = np.random.default_rng((self.grid.rank, i)).random(block.shape, np.float32)
        self.background = checkpoint.AsyncCheckpointer(self.grid)
        self.plain, self.saved = directory / f"plain{self.grid.rank}", directory / "saved"
        if self.grid.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        MPI.COMM_WORLD.Barrier()
        checkpoint.save(directory / "first", {}, {}, self.grid)  # imports h5py

    def turns(self) -> list[Turn]:
        """Return what is timed, in the order of a round."""
        return [
            Turn("plain write", self._remove, lambda: disk.write(self.plain, self.blocks)),
            Turn("save", lambda: None, self._save, "plain write"),
            Turn("plain read, cold", self._forget, lambda: disk.read(self.plain, self.blocks)),
            Turn("load, cold", self._forget, self._load, "plain read, cold"),
            Turn("plain read, warm", self._warm, lambda: disk.read(self.plain, self.blocks)),
            Turn("load, warm", self._warm, self._load, "plain read, warm"),
        ]

    def _save(self) -> None:
        checkpoint.save(self.saved, self.state, {}, self.grid)

    def _load(self) -> None:
        checkpoint.load(self.saved, self.state, self.grid)

    def _remove(self) -> None:
        self.plain.unlink(missing_ok=True)
        if self.grid.rank == 0:
            shutil.rmtree(self.saved, ignore_errors=True)

    def _forget(self) -> None:
        disk.forget([self.plain])
        if self.grid.rank == 0:
            disk.forget(self.saved.glob("*"))

    def _warm(self) -> None:
        disk.read(self.plain, self.blocks)
        self._load()

    def behind(self) -> dict[str, float]:
        """Do steps while a checkpoint is written; return seconds: of the save, its stall and a step beside and alone.

        A step multiplies matrices as training does on `_TOKENS` tokens of a model whose weights and moments of Adam are
        the state, 6 flop for each token and weight, and then changes the whole state.
        """
        saving, directory = self.background, self.directory / "behind"
        saving.reserve(self.state)
        self._step(saving)
        alone = self._timed_steps(saving, _STEPS)
        begun, before = time.perf_counter(), saving.stalled
        saving.begin(directory, self.state, {})
        beside: list[float] = []
        while not MPI.COMM_WORLD.bcast(directory.exists()):
            beside += self._timed_steps(saving, 1)
        taken = time.perf_counter() - begun
        saving.finish()
        stalled = max(MPI.COMM_WORLD.allgather(saving.stalled - before))
        if self.grid.rank == 0:
            shutil.rmtree(directory)
        MPI.COMM_WORLD.Barrier()
        return {
            "save": taken,
            "stall": stalled,
            "alone": statistics.median(alone),
            "beside": statistics.median(beside) if beside else statistics.median(alone),
        }

    def _timed_steps(self, saving: Any, count: int) -> list[float]:
        return [timing.timed(lambda: self._step(saving), MPI.COMM_WORLD) for _ in range(count)]

    def _step(self, saving: Any) -> None:
        a = np.ones((512, 512), np.float32)
        flop = 6 * _TOKENS * self.bytes / 12 / self.grid.size
        for _ in range(max(1, round(flop / (2 * 512**3)))):
            a @ a
        MPI.COMM_WORLD.Barrier()  # as the reduction of gradients
        saving.settle()
        for block in self.blocks:
            block *= 1.0
        saving.poll()
