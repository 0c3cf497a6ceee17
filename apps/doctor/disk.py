"""Checks of the run directory, to which all ranks must write fast enough, of HDF5, and of room for small files."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from mpi4py import MPI

from colossal_mpi.apps.doctor.facts import Facts
from colossal_mpi.apps.doctor.finding import BAD, GOOD, WARNING, Finding, named

_MIB, _GB = 1 << 20, 1e9
_EACH, _ALL = 32 * _MIB, 256 * _MIB  # bytes that one rank and all ranks write at most
_CHUNK, _PATIENCE = 8 * _MIB, 3.0  # bytes between two flushes, and seconds after which writing stops
_SLOW = 50e6  # bytes/s: the disk of a laptop is ten times as fast
_VOLATILE = ("tmpfs", "ramfs")
_T = TypeVar("_T")
_Outcome: TypeAlias = tuple[str, int, float, float, str]
"""The failure of a rank, the bytes it wrote, seconds of writing and reading, and its host."""


def files(facts: Sequence[Facts]) -> Finding:
    """Return the finding about HDF5."""
    h5py, hdf5, mpi = facts[0]["hdf5"]
    how = "with MPI" if mpi else "without MPI, which is not needed: each rank writes a file of its own"
    return Finding("HDF5", GOOD, f"h5py {h5py}, HDF5 {hdf5}, {how}")


def check(directory: Path, world: MPI.Comm) -> list[Finding]:
    """Write, flush, read and remove a file of each rank in the run directory. Collective; rank 0 has the findings."""
    made: list[Path] = []
    folder, problem = _attempt(lambda: _make(directory, made)) if world.rank == 0 else (None, "")
    folder, problem = world.bcast((folder, problem))
    if problem:
        _remove(made)
        return [_refused(directory, problem)]
    size = min(_EACH, max(_MIB, _ALL // world.size))
    outcomes = world.gather((*_speeds(Path(folder) / f"rank{world.rank}", size, world), MPI.Get_processor_name()))
    if outcomes is None:
        return []
    free, kind = shutil.disk_usage(folder).free, _file_system(folder)
    shutil.rmtree(folder, ignore_errors=True)
    _remove(made)
    return [_judge(directory, outcomes, free, kind), *_scratch()]


def _make(directory: Path, made: list[Path]) -> str:
    """Make a folder in the directory, and the directory if it is missing; add what was missing to `made`."""
    missing = [path for path in [directory, *directory.parents] if not path.exists()]
    for path in reversed(missing):
        path.mkdir()
        made.append(path)
    return tempfile.mkdtemp(prefix=".doctor-", dir=directory)


def _remove(made: Sequence[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):
            path.rmdir()


def _attempt(action: Callable[[], _T]) -> tuple[_T | None, str]:
    """Return the result of an action and its failure."""
    try:
        return action(), ""
    except OSError as problem:
        return None, problem.strerror or str(problem)


def _refused(directory: Path, problem: str) -> Finding:
    remedy = "choose another with --directory, and with --set run.directory=... for a run; or ask for write access"
    return Finding("disk", BAD, f"the run directory {directory} cannot be written: {problem}", remedy)


def _speeds(path: Path, size: int, world: MPI.Comm) -> tuple[str, int, float, float]:
    """Return the failure of this rank, the bytes it wrote, and the seconds that all ranks took to write and to read."""
    data = os.urandom(size)
    written, failed, writing = _timed(lambda: _write(path, data), world)
    _, broken, reading = _timed(lambda: 0 if failed else _read(path, data[:written]), world)
    return failed or broken, written or 0, writing, reading


def _timed(action: Callable[[], int], world: MPI.Comm) -> tuple[int | None, str, float]:
    """Return the result of an action, its failure, and its seconds on the slowest rank."""
    world.Barrier()
    begun = time.perf_counter()
    done, failed = _attempt(action)
    world.Barrier()
    return done, failed, time.perf_counter() - begun


def _write(path: Path, data: bytes) -> int:
    """Write and flush as many bytes as there is time for, and return their number."""
    begun, written = time.perf_counter(), 0
    with path.open("wb", buffering=0) as file:
        while written < len(data) and time.perf_counter() - begun < _PATIENCE:
            written += file.write(data[written : written + _CHUNK]) or 0
            os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # the system drops its copy, if it agrees, and reading uses the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written


def _read(path: Path, data: bytes) -> int:
    if path.read_bytes() != data:
        raise OSError(0, "what was read is not what was written")
    return len(data)


def _judge(directory: Path, outcomes: Sequence[_Outcome], free: int, kind: str) -> Finding:
    failed = [rank for rank, (problem, *_) in enumerate(outcomes) if problem]
    if failed:
        problem, *_, host = outcomes[failed[0]]
        text = f"{named(failed, len(outcomes))} ({host}) cannot use the run directory {directory}: {problem}"
        return Finding("disk", BAD, text, "choose a directory that all hosts share, and that has room")
    total = sum(written for _, written, *_ in outcomes)
    write, read = (total / max(seconds) for seconds in zip(*(one[2:4] for one in outcomes), strict=True))
    text = (
        f"{directory} ({kind}): written and flushed at {write / 1e6:,.0f} MB/s, read at {read / 1e6:,.0f} MB/s, "
        f"{free / _GB:,.1f} GB free"
    )
    if kind in _VOLATILE:
        return Finding("disk", WARNING, text, "this is memory and lost with the machine: choose a disk for runs")
    if free < _GB:
        return Finding("disk", WARNING, text, "make room: a checkpoint may not fit")
    if write < _SLOW:
        return Finding("disk", WARNING, text, "choose a faster file system (scratch): checkpoints will take long")
    return Finding("disk", GOOD, text)


def _file_system(folder: str) -> str:
    """Return the kind of the file system of a folder."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown file system"
    real = os.path.realpath(folder) + "/"
    found = [(len(at), kind) for at, kind in mounts if real.startswith(at.rstrip("/") + "/")]
    return max(found, default=(0, "unknown file system"))[1]


def _scratch() -> Iterator[Finding]:
    """Yield the problems of the folders for small files of MPI and Python."""
    shared = Path("/dev/shm")
    if shared.is_dir() and (total := shutil.disk_usage(shared).total) <= 64 * _MIB:
        text = f"/dev/shm has {total / _MIB:.0f} MiB in all: MPI's messages between ranks of a node go through it"
        yield Finding("disk", WARNING, text, "start the container with --shm-size=1g")
    temporary = tempfile.gettempdir()
    if (free := shutil.disk_usage(temporary).free) < 100 * _MIB:
        yield Finding("disk", WARNING, f"{temporary} has {free / _MIB:.0f} MiB left", "make room, or set TMPDIR")
