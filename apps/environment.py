"""The environment of a run: ranks, nodes, cores or GPUs, versions of packages, and the greatest memory of the process.

Training runs write it into ``run.json`` and the doctor compares it between ranks. ``colossal_mpi.machine`` measures the
rates of the machine.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mpi4py import MPI

from colossal_mpi import comm
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend
from colossal_mpi.runtime import launcher

PACKAGES = (
    "colossal-mpi",
    "numpy",
    "mpi4py",
    "h5py",
    "torch",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "safetensors",
    "ml-dtypes",
    "scikit-learn",
    "tokenizers",
    "tensorboardX",
)
"""The packages that a run may use, the required ones first."""


def describe(grid: Grid) -> dict[str, Any]:
    """Return the environment of a run, as plain values.

    Parameters
    ----------
    grid : Grid
        The ranks of the run.

    Returns
    -------
    dict
        ``ranks``, ``nodes`` (host and ranks of each), ``cores_per_rank``, ``processor``, ``devices``, ``system``,
        ``mpi`` and ``versions``, the same on all ranks.

    Notes
    -----
    **Communication:** one gather of names.
    """
    places = comm.collect((platform.node(), len(launcher.cpus()), grid.device), grid)
    hosts = [host for host, *_ in places]
    return {
        "ranks": grid.size,
        "nodes": [{"host": host, "ranks": hosts.count(host)} for host in dict.fromkeys(hosts)],
        "cores_per_rank": sorted({cores for _, cores, _ in places}),
        "processor": processor() if grid.device == "cpu" else backend.describe_gpu(),
        "devices": sorted({device.partition(":")[0] for *_, device in places}),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "mpi": MPI.Get_library_version().partition("\n")[0].strip().strip("\0"),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES` that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int:
    """Return the greatest resident memory of this process so far, in bytes."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
