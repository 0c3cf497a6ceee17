"""What importing the package does for a rank: find MPI, check the launch, limit BLAS, leave no orphans, keep memory.

How a rank leaves is the business of `colossal_mpi.exits`.
"""

import ctypes
import functools
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

from colossal_mpi import exits
from colossal_mpi.errors import LaunchError

# Hydra (MPICH, Intel MPI), Open MPI, srun. Neither SLURM_NTASKS, which is also set in a batch script that
# runs python alone, nor MPI_LOCALNRANKS proves that this process is one of several.
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@functools.cache
def install() -> None:
    """Import MPI, check the launch and, in a job of several ranks, guard this rank.

    **Communication:** none now; when a rank fails, one empty message for each doubling of the ranks.

    Raises
    ------
    LaunchError
        MPI is missing, or the launcher does not belong to the MPI library. In a job of several processes
        only rank 0 raises it; the others exit with code 1 and say nothing.
    """
    mpi = _import_mpi()
    size = mpi.COMM_WORLD.size if mpi.Is_initialized() and not mpi.Is_finalized() else 1
    told, _ = launched()
    if mpi.Is_initialized() and size == 1 < told:
        _refuse(_mismatch(told, " ".join(mpi.Get_library_version().splitlines()[0].split(",")[0].split())))
    _keep_freed_memory()
    if size > 1:
        _limit_blas()
        _die_with_launcher()
        exits.watch()


def launched() -> tuple[int, int]:
    """Return the size and rank that a launcher gave this process in its environment; (1, 0) if none did."""
    for size, rank in _LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return int(os.environ[size]), int(os.environ[rank])
    return 1, 0


def _import_mpi() -> Any:
    alone = launched()[0] == 1 and "PMIX_RANK" not in os.environ
    # Without these Open MPI looks for network providers for a second, even with nobody to talk to.
    quick = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm"} if alone else {}
    added = {name: value for name, value in quick.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            # LaunchError says the same as this warning, once for the job and with the remedy
            warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
            from mpi4py import MPI
    except (ImportError, RuntimeError) as problem:  # mpi4py raises RuntimeError when it finds no libmpi
        reason = "; ".join(str(problem).splitlines()[:2])
        _refuse(
            f"MPI was not found ({reason}): `pip install colossal-mpi[mpich]` brings one; on a cluster, load "
            "its MPI module and `pip install --no-binary=mpi4py mpi4py`"
        )
    finally:
        for name in added:
            del os.environ[name]
    return MPI


def _refuse(message: str) -> NoReturn:
    if launched()[1] != 0:
        raise SystemExit(1)
    sys.excepthook = exits.show
    raise LaunchError(message) from None


def _mismatch(told: int, library: str) -> str:
    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    start = beside if os.path.exists(beside) else "the mpiexec of that library"
    if "SLURM_JOB_ID" in os.environ:
        start += " or srun --mpi=pmi2 (MPICH, Intel MPI) or --mpi=pmix (Open MPI)"
    return (
        f"the launcher started {told} processes, but each is alone in its MPI world: the launcher does not "
        f"belong to {library}, which mpi4py uses. Start with {start}, or `colossal-mpi run -n {told} ...`"
    )


def _limit_blas() -> None:
    # On 2 cores 4 ranks with the default number of threads each were 6.5 times slower than with one.
    if any(name in os.environ for name in _THREADS):
        return
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # for what is loaded from now on: scipy, torch
    import numpy  # noqa: F401
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")  # for what was loaded before


def _keep_freed_memory() -> None:
    # glibc gives blocks above 128 KiB back to the system and takes them anew, zeroed page by page: a training step on
    # one rank took 0.15 s so, and 0.12 s with this. Larger blocks still go back: kept, they would fragment the heap.
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or any(n.startswith("MALLOC_") for n in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 28)
        mallopt(m_trim_threshold, 1 << 30)


def _die_with_launcher() -> None:
    # Open MPI leaves its ranks running when mpiexec is killed. Slurm cleans up by itself, and the signal
    # comes when the parent *thread* ends, which is known to be harmless for hydra and prterun only.
    if sys.platform == "linux" and os.getppid() != 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
