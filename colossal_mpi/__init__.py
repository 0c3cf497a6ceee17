"""Distributed dense linear algebra and parallel deep learning on MPI: everything is a layout.

Users import grids, layouts and distributed arrays from here, linear algebra from ``linalg`` and layers from ``layers``.
The import installs the guards that end all ranks of a job when one fails; arrays call `colossal_mpi.redistribution` to
move and `colossal_mpi.comm` to communicate.
"""

from colossal_mpi.runtime import guards as _guards

_guards.install()

from colossal_mpi import comm, ledger, linalg, random  # noqa: E402
from colossal_mpi.distarray import DistArray, from_global, full, zeros  # noqa: E402
from colossal_mpi.errors import (  # noqa: E402
    CheckpointError,
    ColossalError,
    ConfigError,
    DTypeError,
    GridError,
    IndexingError,
    LaunchError,
    LayoutError,
    MismatchError,
    OptionError,
    ScheduleError,
    ShapeError,
    SharingError,
    SingularError,
    VerificationError,
)
from colossal_mpi.grid import Grid  # noqa: E402
from colossal_mpi.layout import Layout  # noqa: E402

__all__ = [
    "CheckpointError",
    "ColossalError",
    "ConfigError",
    "DTypeError",
    "DistArray",
    "Grid",
    "GridError",
    "IndexingError",
    "LaunchError",
    "Layout",
    "LayoutError",
    "MismatchError",
    "OptionError",
    "ScheduleError",
    "ShapeError",
    "SharingError",
    "SingularError",
    "VerificationError",
    "comm",
    "from_global",
    "full",
    "ledger",
    "linalg",
    "random",
    "zeros",
]
