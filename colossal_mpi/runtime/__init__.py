"""The life of a rank as a process: start-up checks, the launcher, signals, and the end of a job.

``import colossal_mpi`` calls `install` before anything else; the commands of ``apps``, the test runner and the probe of
CUDA-awareness start processes with `mpiexec_command` and `child_environment`. The package calls mpi4py and the
operating system, and imports nothing of ``colossal_mpi`` but the errors. Importing it does not import MPI.

Modules
-------
guards
    Checks when a rank starts: MPI, the launcher, the number of BLAS threads.
launcher
    The mpiexec that belongs to the MPI library, and the environment of child processes.
signals
    The reactions of a rank to SIGINT, SIGHUP and SIGUSR1, even inside an MPI call.
watchdog
    The watch over the ranks of a node: who is gone, who waits for whom, and the deadline of every wait.
exits
    The hooks that end a job when a rank leaves it, so that no other rank waits for ever.
agreement
    The check that all ranks have the same package, axes and configuration.
"""

from colossal_mpi.runtime import agreement, exits, guards, launcher, signals, watchdog
from colossal_mpi.runtime.agreement import require_equal
from colossal_mpi.runtime.guards import install, launched, library, mismatch, require_mpi
from colossal_mpi.runtime.launcher import JOB_ID_VARIABLES, can_start, child_environment, cpus, mpiexec_command

__all__ = [
    "JOB_ID_VARIABLES",
    "agreement",
    "can_start",
    "child_environment",
    "cpus",
    "exits",
    "guards",
    "install",
    "launched",
    "launcher",
    "library",
    "mismatch",
    "mpiexec_command",
    "require_equal",
    "require_mpi",
    "signals",
    "watchdog",
]
