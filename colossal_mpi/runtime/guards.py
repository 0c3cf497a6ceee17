"""The start of a rank at import: find MPI, check the launcher, limit BLAS threads, leave no orphans.

``colossal_mpi/__init__.py`` calls `install` first. It imports MPI and calls `colossal_mpi.runtime.exits.watch` and
`colossal_mpi.runtime.signals.listen` in a job of several ranks. ``colossal-mpi doctor`` shows `mismatch` and `library`.
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

# Size and rank by Hydra (MPICH, Intel MPI), Open MPI and srun. SLURM_NTASKS is also set in a batch script that runs
# python alone, and MPI_LOCALNRANKS does not prove either that this process is one of several.
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_DOCTOR = (("colossal-mpi", "doctor"), ("colossal_mpi.apps.cli", "doctor"))
_PATIENCE = 1.0  # seconds for rank 0 to print: Open MPI's mpiexec ends all ranks as soon as one leaves
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@functools.cache
def install() -> None:
    """Import MPI, check the launcher and, in a job of several ranks, install the hooks of this rank.

    In a job of several ranks it also limits BLAS to one thread for each rank, unless the environment says otherwise,
    and asks Linux to kill this rank when its launcher ends. Only the first call has an effect.

    Raises
    ------
    LaunchError
        If MPI is missing, or the launcher does not belong to the MPI library. In a job of several processes only
        rank 0 raises it; the others exit with code 1 and print nothing.

    Notes
    -----
    **Communication:** none during the call. When a rank fails, the ranks exchange one empty message for each doubling
    of their number.
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
    """Return the number of ranks and the rank that a launcher has put into the environment.

    Returns
    -------
    size : int
        The number of ranks; 1 if no launcher started this process.
    rank : int
        The rank of this process; 0 if no launcher started it.
    """
    for size, rank in _LAUNCHERS:
        if size in os.environ and rank in os.environ:
            return int(os.environ[size]), int(os.environ[rank])
    return 1, 0


def _import_mpi() -> Any:
    alone = launched()[0] == 1 and "PMIX_RANK" not in os.environ
    # Without these variables Open MPI looks for network providers for a second, even for a process alone.
    quick = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm"} if alone else {}
    added = {name: value for name, value in quick.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            # LaunchError says the same as this warning, but once for the job and with the remedy.
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
    """Import MPI. Under the mpiexec of Open MPI, where MPICH and Intel MPI would abort, initialise them alone."""
    from mpi4py import rc

    # MPIR_CVAR_PMI_VERSION=x says that an MPICH built with PMIx is started so on purpose.
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
    """Return a message and a remedy if the launcher of this process does not belong to the MPI library.

    Returns
    -------
    (str, str) or None
        The problem and its remedy; None if launcher and library fit.
    """
    from mpi4py import MPI

    size = MPI.COMM_WORLD.size if MPI.Is_initialized() and not MPI.Is_finalized() else 1
    started, _ = launched()
    if not MPI.Is_initialized() or not size == 1 < started:
        return None
    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    start = beside if os.path.exists(beside) else "the mpiexec of that library"
    if "SLURM_JOB_ID" in os.environ:
        start += " or srun --mpi=pmi2 (MPICH, Intel MPI) or --mpi=pmix (Open MPI)"
    return (
        f"the launcher started {started} processes, but each is alone in its MPI world: the launcher does not "
        f"belong to {library()}, which mpi4py uses",
        f"Start with {start}, or `colossal-mpi run -n {started} ...`",
    )


def library() -> str:
    """Return the name and version of the MPI library.

    Returns
    -------
    str
        For example ``MPICH 4.3.0``.
    """
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _diagnosing() -> bool:
    """Return whether this is ``colossal-mpi doctor``, which shows a mismatch together with other findings."""
    words = [os.path.basename(word) for word in sys.orig_argv]
    return any(pair in _DOCTOR for pair in itertools.pairwise(words[:4]))


def _refuse(message: str) -> NoReturn:
    if launched()[1] != 0:
        time.sleep(_PATIENCE)
        raise SystemExit(1)
    sys.excepthook = exits.show
    raise LaunchError(message) from None


def _limit_blas() -> None:
    # On 2 cores, 4 ranks with the default number of threads each were 6.5 times slower than with one thread each.
    if any(name in os.environ for name in _THREADS):
        return
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # for libraries that are loaded later: scipy, torch
    import numpy  # noqa: F401
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")  # for libraries that are loaded already


def _keep_freed_memory() -> None:
    # By default glibc returns freed blocks above 128 KiB to the system, which zeroes their pages when they are
    # allocated again: a training step on one rank took 0.15 s, and 0.12 s with these settings. Blocks above 256 MiB are
    # still returned, because keeping them would fragment the heap.
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ or any(n.startswith("MALLOC_") for n in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 28)
        mallopt(m_trim_threshold, 1 << 30)


def _die_with_launcher() -> None:
    # Open MPI leaves its ranks running when mpiexec is killed. Slurm cleans up by itself. The signal comes when the
    # parent *thread* ends, which is known to be harmless for hydra and prterun only.
    parent = os.getppid()
    if sys.platform == "linux" and parent != 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended in between, and no signal will come
            os.kill(os.getpid(), signal.SIGKILL)
