"""The mpiexec that belongs to the MPI library of mpi4py: find it, and make the command and environment of a job.

``colossal-mpi run``, the test runner, the benchmarks and the doctor call `mpiexec_command`. The module asks each
mpiexec for its version, since the mpiexec of another library would start ranks that do not find one another.
"""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from colossal_mpi.errors import ConfigError, LaunchError
from colossal_mpi.runtime import guards

# Words in the output of `mpiexec --version`, for each library that it can start. Intel MPI and MPICH share one ABI.
_VERSION_WORDS = {
    "MPICH": ("HYDRA", "Intel(R) MPI"),
    "Intel MPI": ("Intel(R) MPI", "HYDRA"),
    "Open MPI": ("Open MPI", "OpenRTE", "PRRTE"),
}
JOB_ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "FLUX_JOB_ID")
"""Environment variables in which schedulers put the number of a job."""
_HOST_VARIABLES = ("SLURM_JOBID", "SLURM_NODELIST", "PBS_NODEFILE", "PE_HOSTFILE", "LSB_HOSTS", "LSB_MCPU_HOSTS")


def mpiexec_command(
    n: int, command: Sequence[str], *, env: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Return the command line that starts a program on n ranks, and the environment variables to add.

    Parameters
    ----------
    n : int
        The number of ranks.
    command : sequence of str
        A program and its arguments. This Python runs a file that ends in ``.py``.
    env : mapping of str to str, optional
        The environment of the job; by default this process's environment.

    Returns
    -------
    argv : list of str
        The command line, which begins with the mpiexec of the MPI library.
    variables : dict of str to str
        The environment variables to add.

    Raises
    ------
    ConfigError
        If there is nothing to run, the program does not exist, or n is below 1.
    LaunchError
        If this process is itself a rank of a job or the child of one, no mpiexec belongs to the MPI library, several
        ranks would read their program from standard input, or the nodes of an allocation cannot be reached.

    Examples
    --------
    >>> argv, variables = mpiexec_command(4, ["train.py", "--steps", "10"])
    >>> subprocess.run(argv, env=child_environment(os.environ) | variables)
    """
    from mpi4py import MPI

    env = os.environ if env is None else env
    if n < 1:
        raise ConfigError(f"-n {n}: a job has at least one rank, for example -n 4")
    size, rank = guards.launched()
    if size > 1:
        raise LaunchError(
            guards.stray()
            or f"this is rank {rank} of {size} of a job, and each would start a job of its own: run this "
            "outside of mpiexec and srun, or the command itself under them"
        )
    program, vendor = _program(command, env), MPI.get_vendor()[0]
    if n > 1:
        _refuse_standard_input(program)
    mpiexec = _mpiexec(vendor, env)
    if vendor == "Open MPI":
        options, extra = _open_mpi(n, env)
    else:
        options, extra = _hydra(env) if "HYDRA" in _version(mpiexec) else [], {}
    return [mpiexec, *options, "-n", str(n), *program], extra


def _refuse_standard_input(program: Sequence[str]) -> None:
    if not os.path.basename(program[0]).startswith("python"):
        return
    # python [options] - [arguments]; -W and -X have an argument, and -c and -m end the options
    words = iter(program[1:])
    for word in words:
        if word in ("-W", "-X"):
            next(words, None)
        elif word in ("-", "/dev/stdin"):
            break
        elif not word.startswith("-") or word.startswith(("--", "-c", "-m", "-V", "-h", "-?")):
            return
    raise LaunchError(guards.STANDARD_INPUT)


def _hydra(env: Mapping[str, str]) -> list[str]:
    """Return the options with which MPICH's mpiexec starts ranks on this node although a scheduler's variables are set.

    By itself it starts srun inside an allocation of Slurm, and waits for ever where there is none; and it fails without
    the file of hosts that the variables of PBS name.
    """
    if any(name in env for name in ("HYDRA_LAUNCHER", "HYDRA_BOOTSTRAP", "HYDRA_RMK")):
        return []  # the user has decided
    if not any(name in env for name in (*JOB_ID_VARIABLES, *_HOST_VARIABLES)):
        return []
    local = ["-rmk", "user", "-launcher", "fork"]
    hosts = _hosts(env)
    if hosts <= {"localhost", os.uname().nodename.partition(".")[0]}:
        return local
    if "SLURM_JOB_ID" in env and shutil.which("srun", path=env.get("PATH", os.defpath)) is None:
        raise LaunchError(
            f"SLURM_JOB_ID says that the ranks belong on {', '.join(sorted(hosts))}, and MPICH's mpiexec needs srun, "
            "which is not on PATH: load Slurm's programs, or `HYDRA_LAUNCHER=fork HYDRA_RMK=user colossal-mpi run "
            "...` to start the ranks on this node"
        )
    return []


def _hosts(env: Mapping[str, str]) -> set[str]:
    """Return the hosts that a scheduler's variables name, without domains; none where they name none that exist."""
    names: list[str] = []
    if "SLURM_JOB_ID" in env:
        # compressed, as in n[1-3,7]: only a single host is a name
        names = [env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")]
    elif "LSB_JOBID" in env:
        names = env.get("LSB_HOSTS", "").split() or env.get("LSB_MCPU_HOSTS", "").split()[::2]
    for variable in ("PBS_NODEFILE", "PE_HOSTFILE"):
        if "SLURM_JOB_ID" not in env and env.get(variable):
            try:
                lines = Path(env[variable]).read_text().splitlines()
            except OSError:  # a left-over variable
                continue
            names += [line.split()[0] for line in lines if line.strip()]
    return {name if "[" in name else name.partition(".")[0] for name in names if name}


def _open_mpi(n: int, env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    options = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    if n <= _cores() or any(name in env for name in JOB_ID_VARIABLES):
        return options, {}
    # 1000 small allreduces of 4 ranks on 2 cores took 31 s with ranks that do not yield, and 0.02 s with ranks that do.
    return [*options, "--oversubscribe", "--bind-to", "none"], {"OMPI_MCA_mpi_yield_when_idle": "1"}


def cpus() -> list[int]:
    """Return the numbers of the CPUs (hardware threads) on which this process may run.

    Returns
    -------
    list of int
        The numbers, sorted.
    """
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def _cores() -> int:
    # Open MPI counts cores, and os.cpu_count counts hardware threads.
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
                if can_start(path, vendor):
                    return path
                rejected.append(path)
    others = f" (not of it: {', '.join(rejected)})" if rejected else ""
    raise LaunchError(
        f"mpi4py uses {vendor}, and no mpiexec of it is beside {sys.executable} or on PATH{others}: load the "
        "module of that MPI, start with srun, or `pip install colossal-mpi[mpich]` in a new environment"
    )


def can_start(mpiexec: str, vendor: str) -> bool:
    """Return whether an mpiexec can start programs of an MPI library.

    Parameters
    ----------
    mpiexec : str
        The path of the mpiexec.
    vendor : str
        The name of the library, as ``MPI.get_vendor()`` returns it.

    Returns
    -------
    bool
        Whether the version that it prints names the library.
    """
    return any(word in _version(mpiexec) for word in _VERSION_WORDS.get(vendor, (vendor,)))


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
    return os.path.dirname(sys.executable)  # not resolved: the python of a virtual environment is a symlink


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


def child_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables that would make a child process a rank of this process's job.

    If this process was started as the only rank of a job (``srun -n 1``), its variables would make every child a rank
    of that job; and so would those of any rank. The MPI_Init of ``import colossal_mpi`` leaves no such variables.

    Parameters
    ----------
    env : mapping of str to str
        The environment of this process.

    Returns
    -------
    dict of str to str
        The environment for a child process.
    """
    return {name: value for name, value in env.items() if not guards.makes_rank(name)}
