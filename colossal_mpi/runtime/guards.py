"""What importing the package does for a rank: find MPI, check the launch, limit BLAS, leave no orphans, keep memory.

How a rank leaves is the business of `colossal_mpi.runtime.exits`, what it does on a signal that of
`colossal_mpi.runtime.signals`.
"""

import ctypes
import functools
import itertools
import os
import signal
import sys
import time
import warnings
from typing import Any, NoReturn

from colossal_mpi.errors import LaunchError
from colossal_mpi.runtime import exits, signals

# Hydra (MPICH, Intel MPI), Open MPI, srun. Neither SLURM_NTASKS, which is also set in a batch script that
# runs python alone, nor MPI_LOCALNRANKS proves that this process is one of several.
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_DOCTOR = (("colossal-mpi", "doctor"), ("colossal_mpi.apps.cli", "doctor"))
_PATIENCE = 1.0  # seconds: Open MPI's mpiexec ends the job, and so the rank that speaks, when another one leaves
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
    wrong = mismatch()
    if wrong and not _diagnosing():
        _refuse(". ".join(wrong))
    _keep_freed_memory()
    if mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        _limit_blas()
        _die_with_launcher()
        exits.watch()
        signals.listen()


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
            MPI = _under_any_launcher()
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


def _under_any_launcher() -> Any:
    """Import MPI; under the mpiexec of Open MPI, in which MPICH and Intel MPI would abort, as a process alone."""
    from mpi4py import rc

    # An MPICH that was built to know PMIx is started so with MPIR_CVAR_PMI_VERSION=x.
    ours = rc.initialize and "mpi4py.MPI" not in sys.modules and "MPIR_CVAR_PMI_VERSION" not in os.environ
    if not ours or "OMPI_COMM_WORLD_SIZE" not in os.environ:
        from mpi4py import MPI

        return MPI
    rc.initialize, rc.finalize = False, True
    from mpi4py import MPI

    if MPI.get_vendor()[0] in ("MPICH", "Intel MPI"):
        for name in [name for name in os.environ if name.startswith(("PMIX_", "PRTE_"))]:
            del os.environ[name]
    MPI.Init_thread(getattr(MPI, f"THREAD_{rc.thread_level.upper()}") if rc.threads else MPI.THREAD_SINGLE)
    return MPI


def mismatch() -> tuple[str, str] | None:
    """Say that the launcher of this process is not of the MPI library, and what to do; None if all is well."""
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size if MPI.Is_initialized() and not MPI.Is_finalized() else 1
    told, _ = launched()
    if not MPI.Is_initialized() or not size == 1 < told:
        return None
    return _mismatch(told, library())


def library() -> str:
    """Return the name and version of the MPI library."""
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _diagnosing() -> bool:
    """Say whether this is ``colossal-mpi doctor``, which shows a mismatch among the rest."""
    words = [os.path.basename(word) for word in sys.orig_argv]
    return any(pair in _DOCTOR for pair in itertools.pairwise(words[:4]))


def _refuse(message: str) -> NoReturn:
    if launched()[1] != 0:
        time.sleep(_PATIENCE)
        raise SystemExit(1)
    sys.excepthook = exits.show
    raise LaunchError(message) from None


def _mismatch(told: int, mpi: str) -> tuple[str, str]:
    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    start = beside if os.path.exists(beside) else "the mpiexec of that library"
    if "SLURM_JOB_ID" in os.environ:
        start += " or srun --mpi=pmi2 (MPICH, Intel MPI) or --mpi=pmix (Open MPI)"
    return (
        f"the launcher started {told} processes, but each is alone in its MPI world: the launcher does not "
        f"belong to {mpi}, which mpi4py uses",
        f"Start with {start}, or `colossal-mpi run -n {told} ...`",
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
    parent = os.getppid()
    if sys.platform == "linux" and parent != 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between, and no signal will come
            os.kill(os.getpid(), signal.SIGKILL)
