"""``colossal-mpi bench checkpoint``: saving and loading beside plain writing and reading of the same bytes.

`Checkpoint` lets plain files and checkpoints take turns, and measures after each round how long training waits while a
checkpoint is written in the background.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
import typer
from mpi4py import MPI

from colossal_mpi import checkpoint, zeros
from colossal_mpi.apps.bench import disk, harness, timing
from colossal_mpi.apps.bench.harness import Benchmark, Column, Competitor, Row, number
from colossal_mpi.apps.command import JsonFile
from colossal_mpi.errors import ConfigError
from colossal_mpi.grid import Grid
from colossal_mpi.layout import Layout

Array: TypeAlias = "npt.NDArray[np.float32]"
_ARRAYS, _COLUMNS = 48, 1024
_TOKENS = 128  # tokens of a training step
_STEPS = 2  # training steps without a checkpoint, to compare with


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Benchmark):
    """Time saving and loading beside plain writing and reading of files.

    It also measures how long training waits while a checkpoint is written in the background.
    """

    name = "checkpoint"
    example = "colossal-mpi bench checkpoint --size 2 --directory /scratch/me"

    size: Annotated[float, typer.Option(help="GiB of the state, of all ranks together.")] = 1.0
    ranks: Annotated[int | None, typer.Option(help="Ranks to start: 4 by default, unless under mpiexec.")] = None
    directory: Annotated[Path, typer.Option(help="Directory to write to, on the disk to measure.")] = Path("runs")
    repeat: Annotated[int, typer.Option(help="Rounds of all of them.")] = 5
    json: JsonFile = None

    def __post_init__(self) -> None:
        if not 1e-4 <= self.size < 1e6:
            raise ConfigError(f"--size {self.size}: GiB of the state, for example --size 1")
        assert self.job_size  # checks --ranks
        harness.check_common(self, self.repeat)

    @property
    def job_size(self) -> int:
        return harness.job_size_of(self.ranks)

    def measure(self) -> Iterator[list[Row]]:
        directory = self.directory / "checkpoint-bench"
        try:
            state = State(self.size, directory)
            transfers, behind = state.transfers(), list[Behind]()
            foreign = harness.compete(transfers, self.repeat, lambda: behind.append(state.save_behind_training()))
        finally:
            if MPI.COMM_WORLD.rank == 0:
                shutil.rmtree(directory, ignore_errors=True)
        rows = [_row(one, transfers, state.bytes) for one in transfers]
        if behind:
            rows.append(_background_row(behind, state.bytes))
        yield [row | {"foreign": foreign} for row in rows]

    def show(self, rows: list[Row]) -> None:
        columns = (
            Column("name", lambda row: str(row["name"]), left=True),
            number("best s", "seconds", ".3f"),
            number("median s", "median_seconds", ".3f"),
            number("GiB/s", "rate", ".2f", scale=2**-30),
            number("median", "median_rate", ".2f", scale=2**-30),
            number("ratio", "ratio", ".2f", ""),
            number("median", "median_ratio", ".2f", ""),
            number("from disk", "from_disk", ".0%", ""),
            number("extra memory", "extra_memory", ".1%", ""),
        )
        notes = ["ratio: to the speed of the plain one; all that is written is on the disk (fsync) in its time"]
        by_name = {row["name"]: row for row in rows}
        save, last = by_name["save"], by_name.get(_BACKGROUND)
        if last and save["median_seconds"]:
            rows = [row for row in rows if row is not last]
            own = last["median_stall"] / last["median_seconds"]
            other = last["median_stall"] / save["median_seconds"]
            notes.append(
                f"in the background: whole after {last['median_seconds']:.2f} s, for which training waited "
                f"{last['median_stall'] * 1e3:.0f} ms, {own:.1%} of it and {other:.1%} of the time of a save (best "
                f"{last['stall'] * 1e3:.0f} ms, the first time {last['first_stall'] * 1e3:.0f} ms); a step beside it "
                f"took {last['step_beside']:.2f} s, alone {last['step_alone']:.2f} s"
            )
        state = f"state of {save['bytes'] / 2**30:.2f} GiB over {self.job_size} ranks in {self.directory}"
        harness.show(f"{state}, {self.repeat} interleaved repeats", columns, rows, notes, width=100)


_BACKGROUND = "save in the background"


def _row(one: Transfer, transfers: Sequence[Transfer], size: int) -> Row:
    base = next((other for other in transfers if other.name == one.against), None)
    row: Row = {"name": one.name, "bytes": size, **one.figures(rate=size)}
    if one.timed:
        row |= {"extra_memory": max(one.extra) / size, "from_disk": statistics.median(one.fetched) / size}
    return harness.with_ratios([row], base.figures() if base else None)[0]


def _background_row(found: Sequence[Behind], size: int) -> Row:
    """Return the row of saving in the background, with the first stall apart, in which memory is taken."""
    best, median = min(one.save for one in found), statistics.median(one.save for one in found)
    return {
        "name": _BACKGROUND,
        "bytes": size,
        "seconds": best,
        "median_seconds": median,
        "rate": size / best,
        "median_rate": size / median,
        "stall": min(one.stall for one in found),
        "median_stall": statistics.median(one.stall for one in found),
        "first_stall": found[0].stall,
        "step_alone": statistics.median(one.alone for one in found),
        "step_beside": statistics.median(one.beside for one in found),
    }


class Transfer(Competitor):
    """Writing or reading of the state, on all ranks.

    Parameters
    ----------
    name : str
        Name in the table.
    before : callable
        What to do before each run, untimed.
    action : callable
        The writing or reading.
    against : str, optional
        The transfer whose speed it is compared with.
    reads : State, optional
        The state that the action reads into memory.

    Attributes
    ----------
    extra : list of int
        Bytes of memory that each turn took, of all ranks together.
    fetched : list of int
        Bytes that came from the disk in each turn.
    """

    def __init__(
        self,
        name: str,
        before: Callable[[], None],
        action: Callable[[], None],
        against: str | None = None,
        reads: State | None = None,
    ) -> None:
        super().__init__(name, MPI.COMM_WORLD, MPI.COMM_WORLD.size)
        self.before, self.action, self.against, self.reads = before, action, against, reads
        self.extra, self.fetched = list[int](), list[int]()

    def work(self) -> None:
        self.action()

    def run(self) -> float:
        self.before()
        rest, read = disk.resident(), disk.read_from_disk()
        seconds = super().run()
        counts = MPI.COMM_WORLD.allgather((disk.peak() - rest, disk.read_from_disk() - read))
        self.extra.append(sum(extra for extra, _ in counts))
        self.fetched.append(sum(fetched for _, fetched in counts))
        return seconds

    def check(self) -> str | None:
        self.extra.clear()  # forget the warm-up
        self.fetched.clear()
        if self.reads is None:
            return None
        self.reads.clear()
        timing.timed(self.work, self.group)
        wrong: int = MPI.COMM_WORLD.allreduce(self.reads.restore())
        return f"wrong: {wrong} blocks are not what was written" if wrong else None


@dataclass(frozen=True)
class Behind:
    """Seconds of a save while training goes on."""

    save: float
    """Seconds until the checkpoint was complete."""
    stall: float
    """Seconds for which training waited."""
    alone: float
    """Seconds of a training step without a save."""
    beside: float
    """Seconds of a training step beside the save."""


class State:
    """A random state, cut over all ranks like the weights and the moments of an optimizer.

    Parameters
    ----------
    size : float
        GiB of all ranks together.
    directory : Path
        The directory to write to; what it holds is removed.
    """

    def __init__(self, size: float, directory: Path) -> None:
        self.grid, self.directory = Grid(None, "cpu", row=MPI.COMM_WORLD.size), directory
        shape = (max(1, round(size * 2**30 / _ARRAYS / _COLUMNS / 4)), _COLUMNS)
        names = [f"weights/{i:03}" for i in range(_ARRAYS)]
        self.state = {name: zeros(shape, self.grid, Layout("row", None), "float32") for name in names}
        self.bytes = sum(4 * array.size for array in self.state.values())
        self.blocks: list[Array] = [np.asarray(array.local) for array in self.state.values()]
        for i, block in enumerate(self.blocks):
            block[...] = self._random(i)
        self.background = checkpoint.AsyncCheckpointer(self.grid)
        self.plain, self.saved = directory / f"plain{self.grid.rank}", directory / "saved"
        if self.grid.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        MPI.COMM_WORLD.Barrier()
        checkpoint.save(directory / "first", {}, {}, self.grid)  # loads h5py

    def _random(self, i: int) -> Array:
        """Return the numbers of this rank's block of array `i`."""
        return np.random.default_rng((self.grid.rank, i)).random(self.blocks[i].shape, np.float32)

    def transfers(self) -> list[Transfer]:
        """Return the transfers that take turns, in the order of a round."""
        return [
            Transfer("plain write", self._remove, self._write),
            Transfer("save", lambda: None, self._save, "plain write"),
            Transfer("plain read, cold", self._drop_cache, self._read, reads=self),
            Transfer("load, cold", self._drop_cache, self._load, "plain read, cold", self),
            Transfer("plain read, warm", self._fill_cache, self._read, reads=self),
            Transfer("load, warm", self._fill_cache, self._load, "plain read, warm", self),
        ]

    def _write(self) -> None:
        disk.write(self.plain, self.blocks)

    def _read(self) -> None:
        disk.read(self.plain, self.blocks)

    def _save(self) -> None:
        checkpoint.save(self.saved, self.state, {}, self.grid)

    def _load(self) -> None:
        checkpoint.load(self.saved, self.state, self.grid)

    def clear(self) -> None:
        """Overwrite this rank's blocks with zeros."""
        for block in self.blocks:
            block[...] = 0

    def restore(self) -> int:
        """Restore this rank's blocks, and return how many had changed."""
        wrong = [i for i, block in enumerate(self.blocks) if not np.array_equal(block, self._random(i))]
        for i in wrong:
            self.blocks[i][...] = self._random(i)
        return len(wrong)

    def _remove(self) -> None:
        self.plain.unlink(missing_ok=True)
        if self.grid.rank == 0:
            shutil.rmtree(self.saved, ignore_errors=True)

    def _drop_cache(self) -> None:
        disk.drop_cache([self.plain])
        if self.grid.rank == 0:
            disk.drop_cache(self.saved.glob("*"))

    def _fill_cache(self) -> None:
        self._read()
        self._load()

    def save_behind_training(self) -> Behind:
        """Train while a checkpoint is written, and return the times. Collective over all ranks.

        A training step multiplies matrices as on `_TOKENS` tokens with a model whose weights and two moments of Adam
        are the state, 6 flop for each token and weight, and then changes the whole state.
        """
        saving, directory = self.background, self.directory / "behind"
        saving.reserve(self.state)
        self._step()
        alone = self._timed_steps(_STEPS)
        begun, before = time.perf_counter(), saving.stalled
        saving.begin(directory, self.state, {})
        beside: list[float] = []
        while not MPI.COMM_WORLD.bcast(directory.exists()):
            beside += self._timed_steps(1)
        taken = time.perf_counter() - begun
        saving.finish()
        stalled = max(MPI.COMM_WORLD.allgather(saving.stalled - before))
        if self.grid.rank == 0:
            shutil.rmtree(directory)
        MPI.COMM_WORLD.Barrier()
        step = statistics.median(alone)
        return Behind(taken, stalled, step, statistics.median(beside) if beside else step)

    def _timed_steps(self, count: int) -> list[float]:
        return [timing.timed(self._step, MPI.COMM_WORLD) for _ in range(count)]

    def _step(self) -> None:
        a = np.ones((512, 512), np.float32)
        flop = 6 * _TOKENS * self.bytes / 12 / self.grid.size
        for _ in range(max(1, round(flop / (2 * 512**3)))):
            a @ a
        MPI.COMM_WORLD.Barrier()  # in place of the reduction of gradients
        self.background.settle()
        for block in self.blocks:
            block *= 1.0
        self.background.poll()
