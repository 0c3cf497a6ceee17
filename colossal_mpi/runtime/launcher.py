"""Find the mpiexec that belongs to the MPI library that mpi4py uses, and what it needs to start a job."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpi4py import MPI

from colossal_mpi.errors import ConfigError, LaunchError
from colossal_mpi.runtime.guards import launched

# What `mpiexec --version` says, for every library that it can start. Intel MPI and MPICH share one ABI.
_SAYS = {
    "MPICH": ("HYDRA", "Intel(R) MPI"),
    "Intel MPI": ("Intel(R) MPI", "HYDRA"),
    "Open MPI": ("Open MPI", "OpenRTE", "PRRTE"),
}
ALLOCATIONS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID")
"""Environment variables with the number of a job, of the schedulers."""
_OF_A_RANK = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDI_", "MPI_LOCAL")
_SETTINGS = ("PMIX_MCA_",)


def mpiexec_command(
    n: int, command: Sequence[str], *, env: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return the arguments that start a command on n ranks, and the environment variables to add.

    Parameters
    ----------
    n
        Number of ranks.
    command
        A program and its arguments. A file that ends in ``.py`` is run by this Python.
    env
        The environment of the job; that of this process if left out.
    """
    env = os.environ if env is None else env
    if n < 1:
        raise ConfigError(f"-n {n}: a job has at least one rank, for example -n 4")
    size, rank = launched()
    if size > 1:
        raise LaunchError(
            f"this is rank {rank} of {size} of a job, and each would start a job of its own: run this "
            "outside of mpiexec and srun, or the command itself under them"
        )
    vendor = MPI.get_vendor()[0]
    options, extra = _open_mpi(n, env) if vendor == "Open MPI" else ([], {})
    return [_mpiexec(vendor, env), *options, "-n", str(n), *_program(command, env)], extra


def _open_mpi(n: int, env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    options = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    if n <= _cores() or any(name in env for name in ALLOCATIONS):
        return options, {}
    # A rank that does not yield took 31 s for 1000 small allreduces of 4 ranks on 2 cores, instead of 0.02 s.
    return [*options, "--oversubscribe", "--bind-to", "none"], {"OMPI_MCA_mpi_yield_when_idle": "1"}


def cpus() -> list[int]:
    """Return the numbers of the CPUs (hardware threads) that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _cores() -> int:
    # Open MPI counts cores, where os.cpu_count counts hardware threads.
    cores = set()
    for cpu in cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    return len(cores)


def _mpiexec(vendor: str, env: Mapping[str, str]) -> str:
    rejected = []
    for folder in [_here(), *env.get("PATH", os.defpath).split(os.pathsep)]:
        for name in ("mpiexec", "mpiexec.hydra", "mpirun"):
            path = shutil.which(name, path=folder) if folder else None
            if path and path not in rejected:
                if belongs(path, vendor):
                    return path
                rejected.append(path)
    others = f" (not of it: {', '.join(rejected)})" if rejected else ""
    raise LaunchError(
        f"mpi4py uses {vendor}, and no mpiexec of it is beside {sys.executable} or on PATH{others}: load the "
        "module of that MPI, start with srun, or `pip install colossal-mpi[mpich]` in a new environment"
    )


def belongs(mpiexec: str, vendor: str) -> bool:
    """Say whether an mpiexec can start programs of an MPI library."""
    return any(word in _version(mpiexec) for word in _SAYS.get(vendor, (vendor,)))


@functools.cache
def _version(path: str) -> str:
    try:
        answer = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout + answer.stderr


def _here() -> str:
    return os.path.dirname(sys.executable)  # not resolved: the python of a virtual environment is a link


def _program(command: Sequence[str], env: Mapping[str, str]) -> list[str]:
    if not command:
        raise ConfigError("nothing to run: give a command, for example `colossal-mpi run -n 4 train.py`")
    name, *rest = command
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such file in {Path.cwd()}")
        return [sys.executable, name, *rest]
    found = shutil.which(name, path=_here()) or shutil.which(name, path=env.get("PATH", os.defpath))
    if found is None:
        raise ConfigError(f"{name}: no such program beside {sys.executable} or on PATH; give a .py file or a program")
    return [found, *rest]


def inherited(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what would make the children of this process ranks of its own job."""
    # Started as the only rank of a job (srun -n 1), this process has variables that would make every child a
    # rank of that job. The MPI_Init of `import colossal_mpi` itself leaves none: test_launch checks it.
    return {name: env[name] for name in env if name.startswith(_SETTINGS) or not name.startswith(_OF_A_RANK)}
