"""Where a run runs: its ranks, their cores or GPUs, the versions, and how many operations a second they can do."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mpi4py import MPI

from colossal_mpi import comm
from colossal_mpi.grid import Grid
from colossal_mpi.platform import backend, blas
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
"""What a run may use, the indispensable first."""
_LONG_ENOUGH = 4e-3
"""Seconds of one product, from which on what is measured is its rate and not how it is called."""
_LARGEST = 8192
_ROUNDS, _SECONDS = 2, 0.05


def describe(grid: Grid) -> dict[str, Any]:
    """Return the facts of a run's machine, as plain values.

    **Communication:** one gather of names.
    """
    told = comm.collect((platform.node(), len(launcher.cpus()), grid.device), grid)
    hosts = [host for host, *_ in told]
    return {
        "ranks": grid.size,
        "nodes": [{"host": host, "ranks": hosts.count(host)} for host in dict.fromkeys(hosts)],
        "cores_per_rank": sorted({cores for _, cores, _ in told}),
        "processor": processor() if grid.device == "cpu" else backend.describe_gpu(),
        "devices": sorted({device.partition(":")[0] for *_, device in told}),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "mpi": MPI.Get_library_version().partition("\n")[0].strip().strip("\0"),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    """Return the versions of those `PACKAGES` that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the name of the processor, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> int:
    """Return the greatest number of bytes of memory that this process has had resident."""
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def measure_peak(grid: Grid, dtype: str) -> float:
    """Return the operations a second of square products on all ranks at once, the best of some rounds.

    Ranks that share cores share their rate. A product takes some milliseconds, and all of it a quarter of a second.

    **Communication:** a gather of a number before and after each round.
    """
    size = _size(grid, dtype)
    operands = _operands(grid, dtype, size)
    best = 0.0
    for _ in range(_ROUNDS):
        comm.collect(None, grid)
        begun, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begun < _SECONDS:
            _multiply(operands)
            count += 1
        told = comm.collect((2.0 * count * size**3, time.perf_counter() - begun), grid)
        best = max(best, sum(flop for flop, _ in told) / max(seconds for _, seconds in told))
    return best


def _size(grid: Grid, dtype: str) -> int:
    """Return the size of a product that takes long enough."""
    size = 256
    while size < _LARGEST:
        operands = _operands(grid, dtype, size)
        _multiply(operands)
        begun = time.perf_counter()
        _multiply(operands)
        if time.perf_counter() - begun > _LONG_ENOUGH:
            break
        size *= 2
    return size


def _operands(grid: Grid, dtype: str, size: int) -> tuple[Any, Any, Any]:
    xp = grid.xp
    kind = backend.dtype_of(xp, dtype)
    a, b = (xp.full((size, size), 1.0 / size, dtype=kind) for _ in range(2))
    wide = xp.float32 if backend.is_half(kind) else kind
    return a, b, xp.empty((size, size), dtype=wide)


def _multiply(operands: tuple[Any, Any, Any]) -> None:
    a, b, c = operands
    blas.gemm(a, b, c)
    backend.synchronize(c)
