"""What one rank knows about itself, as plain values: ranks of different versions can still tell them to one another."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from mpi4py import MPI

import colossal_mpi
from colossal_mpi.apps import environment
from colossal_mpi.checkpoint import hdf5
from colossal_mpi.platform import backend, cuda_aware
from colossal_mpi.runtime import guards, launcher

Facts: TypeAlias = dict[str, Any]
"""Of one rank, by name: see `mine`."""
_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def mine(world: MPI.Comm) -> Facts:
    """Return what this rank knows about itself.

    **Communication:** the communicator of its node is made, over which the least rank is told.
    """
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
    """Return the ranks node by node."""

    def node(of: Facts) -> Any:
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
    """Return the CPUs' worth of time that the control groups of this process grant it, None if they set no limit."""
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


def gpus(number: int) -> Facts:
    """Return the GPUs of the machine, those that this process sees, and which it takes as the `number`-th of a node."""
    driver = Path("/proc/driver/nvidia/gpus")
    seen = backend.visible_gpus()
    return {
        "installed": sorted(path.name.lower() for path in driver.iterdir()) if driver.is_dir() else [],
        "seen": seen,
        "taken": number % len(seen) if seen else None,
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
