"""Whether MPI may be given GPU memory: found out, since a library that cannot read it dies of the pointer.

In this order, the first that knows decides:

1. the user's word, ``COLOSSAL_MPI_CUDA_AWARE=0`` or ``1``;
2. a tiny exchange of device memory in a child process, which may die of it (`colossal_mpi.platform._probe`);
3. ``mpi_memory_alloc_kinds`` (MPI 4.1) in the info of ``COMM_WORLD``;
4. ``MPIX_Query_cuda_support`` of the loaded library (Open MPI, MPICH and its kin).

Where none knows, blocks are staged through host memory, which always works.
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

WORD = "COLOSSAL_MPI_CUDA_AWARE"
DEADLINE = 60.0
"""Seconds that the child may take; on a busy node, importing CuPy and starting a CUDA context are most of them."""
_PROGRAM = Path(__file__).with_name("_probe.py")
_EXCHANGING, _DONE = "exchanging", "done"  # what the child prints


@dataclass(frozen=True)
class Awareness:
    """Whether MPI may be given device memory, and how that is known."""

    aware: bool
    reason: str

    def __str__(self) -> str:
        return f"{'CUDA-aware' if self.aware else 'staged through host memory'}: {self.reason}"


_known: dict[str, Awareness] = {}


def find(device: str) -> Awareness:
    """Say whether the MPI of this process may be given memory of `device`; found out once per process.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda:<i>"`` or another registered device.

    Raises
    ------
    GridError
        If the user's word is neither 0 nor 1.
    """
    kind = device.partition(":")[0]
    word = _word()
    if kind == "cpu":
        return Awareness(False, "blocks lie in host memory")
    if word is not None:
        return word
    if kind != "cuda":
        return Awareness(False, f"{device} is no GPU")
    if kind not in _known:
        _known[kind] = _search(device)
    return _known[kind]


def agreed(device: str, comm: MPI.Comm, node: MPI.Comm) -> Awareness:
    """Return what the ranks of `comm` know together: MPI is given device memory where it reads that of all of them.

    A message itself would not care if one side is staged. But a library may choose the algorithm of a collective by the
    kind of its buffers, and ranks that choose differently wait for one another for ever.

    **Communication:** a bcast on the node, whose first rank alone starts a child, and an allgather, of small objects.
    """
    _word()  # an error of it before anything is sent
    mine = node.bcast(find(device) if node.rank == 0 else None, 0)
    if device.partition(":")[0] == "cuda":
        _known.setdefault("cuda", mine)
    return next((found for found in comm.allgather(mine) if not found.aware), mine)


def _word() -> Awareness | None:
    word = os.environ.get(WORD, "")
    if word not in ("", "0", "1"):
        raise GridError(f"{WORD}={word!r}: use 1 if MPI reads GPU memory, 0 if not, or leave it out to find out")
    return Awareness(word == "1", f"by the user's word, {WORD}={word}") if word else None


def _search(device: str) -> Awareness:
    # -P: the folder of the program, where `random` is a module of ours, is not searched
    program = [sys.executable, "-P", str(_PROGRAM), device.partition(":")[2]]
    found = probe(program) or by_memory_kinds(MPI.COMM_WORLD) or by_query(loaded_libraries())
    return found or Awareness(False, f"nothing tells whether this MPI reads GPU memory; {WORD}=1 says that it does")


def probe(program: Sequence[str], deadline: float = DEADLINE) -> Awareness | None:
    """Run a program that exchanges device memory; None if it ended before the exchange and so tells nothing.

    Parameters
    ----------
    program : sequence of str
        Prints ``exchanging`` before it gives MPI device memory and ``done`` after the right values have arrived.
    deadline : float
        Seconds after which it is killed.
    """
    with subprocess.Popen(
        program,
        env=launcher.inherited(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            said, _ = child.communicate(timeout=deadline)
            how = _ending(child.returncode)
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
            how = f"did not end in {deadline:g} s"
    words = said.split()
    if _DONE in words and child.returncode == 0:
        return Awareness(True, "a child process exchanged device memory")
    if _EXCHANGING in words:
        return Awareness(False, f"a child process that exchanged device memory {how}")
    return None


def _ending(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"died of {signal.Signals(-status).name}"


def by_memory_kinds(comm: Any) -> Awareness | None:
    """Return what ``mpi_memory_alloc_kinds`` of a communicator says; None where it does not name CUDA memory.

    It lists what was asked for and is supported, so that a kind that is missing tells nothing.
    """
    info = comm.Get_info()
    kinds = (info.Get("mpi_memory_alloc_kinds") or "").split(",")
    info.Free()
    if {"cuda", "cuda:device"} & {kind.strip() for kind in kinds}:
        return Awareness(True, f"mpi_memory_alloc_kinds is {','.join(kinds)}")
    return None


def by_query(libraries: Iterable[Any]) -> Awareness | None:
    """Return the answer of the first of some libraries that has ``MPIX_Query_cuda_support``."""
    for library in libraries:
        query = getattr(library, "MPIX_Query_cuda_support", None)
        if query is not None:
            answer = int(query())
            return Awareness(answer == 1, f"MPIX_Query_cuda_support says {answer}")
    return None


def loaded_libraries() -> list[ctypes.CDLL]:
    """Return the MPI libraries of this process: they may be loaded without their names being global."""
    return [ctypes.CDLL(None), *map(ctypes.CDLL, library_files())]


def library_files() -> list[str]:
    """Return the files of the MPI libraries that this process has loaded; none where the system does not tell."""
    if sys.platform != "linux":
        return []
    mapped = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return list(dict.fromkeys(path for path in mapped if os.path.basename(path).startswith("libmpi")))
