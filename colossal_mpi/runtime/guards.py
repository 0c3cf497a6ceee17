"""The start of a rank at import: find MPI, check the launcher, limit BLAS threads, leave no orphans.

``colossal_mpi/__init__.py`` calls `install` first. It imports MPI and calls `colossal_mpi.runtime.exits.watch` and
`colossal_mpi.runtime.signals.listen` in a job of several ranks. Grids and commands call `require_mpi` before they
communicate: a process that was started by a rank imports everything, but is no rank. ``colossal-mpi doctor`` shows
`mismatch` and `library`.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import signal
import stat
import sys
import time
import warnings
from typing import Any, NoReturn

from colossal_mpi.errors import LaunchError
from colossal_mpi.runtime import exits, signals, watchdog

# Size and rank by Hydra (MPICH, Intel MPI), Open MPI and srun. SLURM_NTASKS is also set in a batch script that runs
# python alone, and MPI_LOCALNRANKS does not prove either that this process is one of several.
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
_OWNER = "_COLOSSAL_MPI_RANK"  # a rank leaves its process and its job in it: its children know that they are not it
_RANK_PREFIXES = (
    *("PMI_", "PMIX_", "PRTE_LAUNCHED", "OMPI_COMM_WORLD_", "HYDI_", "MPI_LOCAL"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", _OWNER),
)
_SETTING_PREFIXES = ("PMIX_MCA_",)  # of these, the user's settings
STANDARD_INPUT = (
    "the program comes from standard input, which mpiexec gives to rank 0 alone: write it to a file, for example "
    "`colossal-mpi run -n 4 train.py`"
)
"""The error about a program of several ranks that is read from standard input."""
_owner = [0]  # the process that initialised MPI; a child made by fork has another number
_DOCTOR = (("colossal-mpi", "doctor"), ("colossal_mpi.apps.cli", "doctor"))
_FORWARDING = 0.2  # seconds for mpiexec to read the message before it ends the job
_PATIENCE = 1.0  # seconds for rank 0 to print: Open MPI's mpiexec ends all ranks as soon as one leaves
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@functools.cache
def install() -> None:
    """Import MPI, check the launcher and, in a job of several ranks, install the hooks of this rank.

    In a job of several ranks it also limits BLAS to one thread for each rank, unless the environment says otherwise,
    and asks Linux to kill this rank when its launcher ends. Only the first call has an effect.

    A child of a rank has the variables of the launcher, but is no rank. MPI is imported there and not initialised, and
    `require_mpi` raises an error; the child of the only rank of a job initialises MPI for itself.

    Raises
    ------
    LaunchError
        If MPI is missing, the launcher does not belong to the MPI library, or the program comes from standard input,
        which only rank 0 can read. In a job of several processes only rank 0 raises it; the others exit with code 1
        and print nothing.

    Notes
    -----
    **Communication:** none during the call. When a rank fails, the ranks exchange one empty message for each doubling
    of their number.
    """
    _drop_odd_variables()
    _refuse_standard_input()
    mpi = _import_mpi(initialize=not (_inherited() and _is_child()))
    _owner[0] = os.getpid()
    wrong = mismatch()
    if wrong and not _diagnosing():
        _refuse(". ".join(wrong))
    _keep_freed_memory()
    if mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        _limit_blas()
        _die_with_launcher()
        exits.watch()
        watchdog.watch(mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size)
        signals.listen()
    if mpi.Is_initialized() and _identity():
        os.environ[_OWNER] = f"{os.getpid()} {_identity()}"


def require_mpi() -> None:
    """Check that this process can communicate, before it calls MPI.

    Raises
    ------
    LaunchError
        If MPI was not initialised in this process, because a rank started it or the program forbade it, or was
        finalised.

    Notes
    -----
    **Communication:** none.
    """
    from mpi4py import MPI

    if MPI.Is_finalized():
        raise LaunchError("MPI was finalised in this process: make grids before MPI.Finalize()")
    if not MPI.Is_initialized():
        raise LaunchError(
            stray() or "MPI is not initialised in this process (mpi4py.rc.initialize is False): call MPI.Init() first"
        )
    if _owner[0] != os.getpid():
        raise LaunchError(
            f"process {os.getpid()} was forked from process {_owner[0]}, which has initialised MPI, and cannot call "
            "MPI: make grids in the parent, or start the child with multiprocessing's 'spawn'"
        )


def makes_rank(name: str) -> bool:
    """Return whether an environment variable makes a process a rank of a job."""
    return name.startswith(_RANK_PREFIXES) and not name.startswith(_SETTING_PREFIXES)


def stray() -> str | None:
    """Return a message if the launcher's variables were made for another process, which started this one; else None."""
    if not _inherited():
        return None
    size, rank = launched()
    return (
        f"this process is no rank of a job: rank {rank} of {size} started it, or left its variables to it. Make grids "
        "in the ranks themselves, or start it as a process alone, with "
        f"env=colossal_mpi.runtime.child_environment(os.environ), in a shell with `{_without_variables()} ...`"
    )


def _without_variables() -> str:
    return " ".join(["env", *(f"-u {name}" for name in sorted(os.environ) if makes_rank(name))])


def _identity() -> str:
    """Return what distinguishes the place of this process in its job: its connection to the launcher."""
    try:
        found = [str(os.fstat(int(os.environ["PMI_FD"])).st_ino)]
    except (KeyError, ValueError, OverflowError, OSError):
        found = []
    names = ("PMIX_NAMESPACE", "PMIX_RANK")  # PMIx connects in another way
    return " ".join(found + [os.environ[name] for name in names if os.environ.get(name)])


def _inherited() -> bool:
    """Return whether the variables of the launcher were made for another process, which started this one."""
    pid, _, identity = os.environ.get(_OWNER, "").partition(" ")
    if identity and identity == _identity():
        return pid != str(os.getpid())
    descriptor = os.environ.get("PMI_FD")
    if descriptor is None:
        return False
    try:
        return not stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode)
    except (ValueError, OverflowError, OSError):  # Python closes it in a child
        return True


def _is_child() -> bool:
    """Return whether this process has to leave MPI alone: it was started by one of several ranks.

    The child of the only rank of a job is a process alone once the variables of the launcher are gone.
    """
    if launched()[0] > 1:
        return True
    for name in [name for name in os.environ if makes_rank(name)]:
        del os.environ[name]
    return False


def _refuse_standard_input() -> None:
    # mpiexec gives standard input to rank 0 alone. The others wait for their program, and rank 0 would wait for them in
    # MPI_Init. srun gives it to every rank.
    given = getattr(sys, "argv", ["-c"])[:1] in (["-"], [""], ["/dev/stdin"])
    if given and launched()[0] > 1 and "SLURM_PROCID" not in os.environ and not _inherited():
        atexit.register(_end_job_before_mpi)
        _refuse(STANDARD_INPUT)


def _end_job_before_mpi() -> None:
    # MPI_Abort needs MPI_Init, which needs all ranks. A process manager that speaks PMI 1 ends the job on this line.
    with contextlib.suppress(KeyError, ValueError, OSError):
        time.sleep(_FORWARDING)
        os.write(int(os.environ["PMI_FD"]), b"cmd=abort exitcode=1\n")


def _drop_odd_variables() -> None:
    # MPICH aborts at variables that no launcher sets like this: emptied in a script, or left over in part.
    env, odd = os.environ, list[str]()
    if not all(env.get(name, "0").isdecimal() for name in ("PMI_SIZE", "PMI_RANK")):
        odd += ["PMI_SIZE", "PMI_RANK"]
    if ":" not in env.get("PMI_PORT", "host:port"):
        odd += ["PMI_PORT"]
    if not env.get("PMIX_NAMESPACE"):
        odd += ["PMIX_RANK"]
    for name in odd:
        env.pop(name, None)


def launched() -> tuple[int, int]:
    """Return the number of ranks and the rank that a launcher has put into the environment.

    Returns
    -------
    size : int
        The number of ranks; 1 if no launcher started this process.
    rank : int
        The rank of this process; 0 if no launcher started it.
    """
    for names in _LAUNCHERS:
        try:
            size, rank = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError):  # left empty, or something else than a number
            continue
        if 0 <= rank < size:
            return size, rank
    return 1, 0


def _import_mpi(initialize: bool = True) -> Any:
    alone = launched()[0] == 1 and "PMIX_RANK" not in os.environ
    # Without these variables Open MPI looks for network providers for a second, even for a process alone.
    quick = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm"} if alone else {}
    added = {name: value for name, value in quick.items() if name not in os.environ}
    os.environ.update(added)
    try:
        with warnings.catch_warnings():
            # LaunchError says the same as this warning, but once for the job and with the remedy.
            warnings.filterwarnings("ignore", "suspicious MPI execution environment", RuntimeWarning)
            MPI = _under_any_launcher() if initialize else _uninitialised()
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


def _uninitialised() -> Any:
    from mpi4py import rc

    before, rc.initialize = rc.initialize, False
    try:
        from mpi4py import MPI
    finally:
        rc.initialize = before
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
        f"Start with {start}, or `colossal-mpi run -n {started} ...`; in a shell that has the variables of a launcher, "
        f"with `{_without_variables()}` before it",
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
