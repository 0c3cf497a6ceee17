"""The facts that a rank states about itself.

The facts are plain values, so that ranks with different versions of the library can exchange them. `examine` gathers
them; every check reads them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from mpi4py import MPI

import colossal_mpi
from colossal_mpi.apps import environment
from colossal_mpi.checkpoint import hdf5
from colossal_mpi.platform import backend, cuda_aware
from colossal_mpi.runtime import guards, launcher

_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


class GPUFacts(TypedDict):
    """The GPUs of a rank."""

    installed: list[str]
    """PCI addresses of the GPUs of the machine."""
    seen: list[tuple[str, str]]
    """PCI address and name of each GPU that the process sees."""
    taken: int | None
    """Index of the GPU in `seen` that the rank uses."""
    visible: str | None
    """The value of ``CUDA_VISIBLE_DEVICES``."""


class Facts(TypedDict):
    """The facts about one rank."""

    rank: int
    node: int
    """The lowest rank of the node."""
    number: int
    """The number of the rank on its node."""
    host: str
    python: str
    executable: str
    source: str
    """A hash of the modules of colossal_mpi."""
    versions: dict[str, str]
    library: str
    libraries: list[str]
    """Files of the MPI libraries that are loaded."""
    threads: int
    """Thread level of MPI."""
    cpus: list[int]
    quota: float | None
    """Number of CPUs whose time the control groups grant."""
    load: float
    """Mean number of processes that want a core, over a minute."""
    blas: list[tuple[str, int]]
    """Name and number of threads of each BLAS."""
    settings: dict[str, str]
    """Environment variables that set numbers of threads."""
    hdf5: tuple[str, str, bool]
    """Versions of h5py and HDF5, and whether HDF5 has MPI."""
    gpus: GPUFacts


def gather(world: MPI.Comm) -> Facts:
    """Return the facts about this rank. Collective: it makes the communicator of the node."""
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    first, number = node.bcast(world.rank), node.rank
    node.Free()
    return {
        "rank": world.rank,
        "node": first,
        "number": number,
        "host": platform.node(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "source": source(Path(colossal_mpi.__file__).parent),
        "versions": environment.versions(),
        "library": guards.library(),
        "libraries": cuda_aware.library_files(),
        "threads": MPI.Query_thread(),
        "cpus": launcher.cpus(),
        "quota": quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")),
        "load": os.getloadavg()[0],
        "blas": blas(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "hdf5": hdf5.versions(),
        "gpus": gpus(number),
    }


def nodes(facts: Sequence[Facts]) -> list[list[Facts]]:
    """Return the facts of the ranks, node by node."""

    def node(of: Facts) -> int:
        return of["node"]

    return [list(group) for _, group in groupby(sorted(facts, key=node), node)]


def source(package: Path) -> str:
    """Return a hash of all modules of a package."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(package, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def quota(root: Path, own: Path) -> float | None:
    """Return the number of CPUs whose time the control groups grant this process; None without a limit."""
    try:
        group = own.read_text().strip().rpartition("\n")[2].partition("::")[2].strip("/")
    except OSError:
        return None
    limits = []
    for path in [root / group, *(root / group).parents]:
        try:
            most, period = (path / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if most != "max":
            limits.append(int(most) / int(period))
    return min(limits, default=None)


def blas() -> list[tuple[str, int]]:
    """Return the name and the number of threads of each BLAS of this process."""
    import numpy  # noqa: F401
    import threadpoolctl

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return [(f"{pool['internal_api']} {pool['version'] or ''}".strip(), pool["num_threads"]) for pool in pools]


def gpus(number: int) -> GPUFacts:
    """Return the GPUs of the rank with this number on its node."""
    driver = Path("/proc/driver/nvidia/gpus")
    seen = backend.visible_gpus()
    return {
        "installed": sorted(path.name.lower() for path in driver.iterdir()) if driver.is_dir() else [],
        "seen": seen,
        "taken": number % len(seen) if seen else None,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
