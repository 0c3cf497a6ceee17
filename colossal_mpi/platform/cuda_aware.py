"""The decision whether MPI may be given GPU memory. A library that cannot read it crashes, so this comes first.

Grids call `agreed` when they are made, and the doctor calls `find`. The first of these sources that gives an answer
decides:

1. the user's setting, ``COLOSSAL_MPI_CUDA_AWARE=0`` or ``1``;
2. a tiny exchange of device memory in a child process, which may crash (`colossal_mpi.platform._probe`);
3. ``mpi_memory_alloc_kinds`` (MPI 4.1) in the info of ``COMM_WORLD``;
4. ``MPIX_Query_cuda_support`` of the loaded library (Open MPI, MPICH and its derivatives).

If none gives an answer, blocks are staged through host memory, which always works.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from colossal_mpi.errors import GridError
from colossal_mpi.runtime import launcher

VARIABLE = "COLOSSAL_MPI_CUDA_AWARE"
"""The environment variable by which the user decides."""
DEADLINE = 60.0
"""Seconds that the child may take. On a busy node most of them pass while CuPy is imported and CUDA is started."""
_PROGRAM = Path(__file__).with_name("_probe.py")
_EXCHANGING, _DONE = "exchanging", "done"  # printed by the child


@dataclass(frozen=True)
class Awareness:
    """The decision whether MPI may be given device memory, and its reason."""

    aware: bool
    reason: str

    def __str__(self) -> str:
        return f"{'CUDA-aware' if self.aware else 'staged through host memory'}: {self.reason}"


_known: dict[str, Awareness] = {}


def find(device: str) -> Awareness:
    """Return whether the MPI of this process may be given memory of a device; the answer is kept.

    Parameters
    ----------
    device : str
        The device: ``"cpu"``, ``"cuda:<i>"`` or another registered one.

    Returns
    -------
    Awareness
        The answer and its reason.

    Raises
    ------
    GridError
        If the user's setting is neither 0 nor 1.
    """
    kind = device.partition(":")[0]
    setting = _user_setting()
    if kind == "cpu":
        return Awareness(False, "blocks lie in host memory")
    if setting is not None:
        return setting
    if kind != "cuda":
        return Awareness(False, f"{device} is no GPU")
    if kind not in _known:
        _known[kind] = _search(device)
    return _known[kind]


def agreed(device: str, comm: MPI.Comm, node: MPI.Comm) -> Awareness:
    """Return the answer for all ranks of a communicator: MPI must be able to read the device memory of every rank.

    A message would work if only one side were staged. But a library may choose the algorithm of a collective by the
    kind of its buffers, and ranks that choose differently wait for one another for ever.

    Parameters
    ----------
    device : str
        The device of this rank.
    comm : MPI.Comm
        The ranks that need the same answer.
    node : MPI.Comm
        The ranks of `comm` on this node. The first of them starts the child process for all.

    Returns
    -------
    Awareness
        The answer and its reason.

    Raises
    ------
    GridError
        If the user's setting is neither 0 nor 1.

    Notes
    -----
    **Communication:** a bcast of a small object over the node, and an allgather of small objects over `comm`.
    """
    _user_setting()  # raises its error before anything is sent
    own: Awareness = node.bcast(find(device) if node.rank == 0 else None, 0)
    if device.partition(":")[0] == "cuda":
        _known.setdefault("cuda", own)
    return next((found for found in comm.allgather(own) if not found.aware), own)


def _user_setting() -> Awareness | None:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise GridError(f"{VARIABLE}={value!r}: use 1 if MPI reads GPU memory, 0 if not, or leave it out to find out")
    return Awareness(value == "1", f"set by {VARIABLE}={value}") if value else None


def _search(device: str) -> Awareness:
    # -P keeps the directory of the program off sys.path
    program = [sys.executable, "-P", str(_PROGRAM), device.partition(":")[2]]
    found = probe(program) or by_memory_kinds(MPI.COMM_WORLD) or by_query(loaded_libraries())
    return found or Awareness(False, f"it is unknown whether this MPI reads GPU memory; set {VARIABLE}=1 if it does")


def probe(program: Sequence[str], deadline: float = DEADLINE) -> Awareness | None:
    """Run a program that exchanges device memory and return the answer that its end gives.

    Parameters
    ----------
    program : sequence of str
        A command that prints ``exchanging`` before it gives MPI device memory, and ``done`` after the right values have
        arrived.
    deadline : float
        Seconds after which it is killed.

    Returns
    -------
    Awareness or None
        None if the program ended before the exchange, which gives no answer.
    """
    with subprocess.Popen(
        program,
        env=launcher.child_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            output, _ = child.communicate(timeout=deadline)
            how = _ending(child.returncode)
        except subprocess.TimeoutExpired:
            child.kill()
            output, _ = child.communicate()
            how = f"did not end in {deadline:g} s"
    words = output.split()
    if _DONE in words and child.returncode == 0:
        return Awareness(True, "a child process exchanged device memory")
    if _EXCHANGING in words:
        return Awareness(False, f"a child process that exchanged device memory {how}")
    return None


def _ending(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"died of {signal.Signals(-status).name}"


def by_memory_kinds(comm: MPI.Comm) -> Awareness | None:
    """Return the answer of a communicator's ``mpi_memory_alloc_kinds``; None if it does not name CUDA memory.

    The info lists kinds that were asked for and are supported, so that a missing kind gives no answer.
    """
    info = comm.Get_info()
    kinds = (info.Get("mpi_memory_alloc_kinds") or "").split(",")
    info.Free()
    if {"cuda", "cuda:device"} & {kind.strip() for kind in kinds}:
        return Awareness(True, f"mpi_memory_alloc_kinds is {','.join(kinds)}")
    return None


def by_query(libraries: Iterable[Any]) -> Awareness | None:
    """Return the answer of the first library that has ``MPIX_Query_cuda_support``; None if none has it."""
    for library in libraries:
        query = getattr(library, "MPIX_Query_cuda_support", None)
        if query is not None:
            answer = int(query())
            return Awareness(answer == 1, f"MPIX_Query_cuda_support says {answer}")
    return None


def loaded_libraries() -> list[ctypes.CDLL]:
    """Return the MPI libraries of this process, even if they were loaded without making their names global."""
    return [ctypes.CDLL(None), *map(ctypes.CDLL, library_files())]


def library_files() -> list[str]:
    """Return the paths of the MPI libraries that this process has loaded; none on systems other than Linux."""
    if sys.platform != "linux":
        return []
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return list(dict.fromkeys(path for path in mapped if os.path.basename(path).startswith("libmpi")))
