"""The errors that users see.

Each is raised from *global* metadata, so that every rank raises the same one, and says what was
required, what came and what would work. What one rank alone can see (a token id out of range) is raised there, and ends
the job unless it is caught. Start-up code prints such an error once, without a traceback.
"""


class ColossalError(Exception):
    """Base of every error that colossal_mpi raises on purpose."""


class GridError(ColossalError, ValueError):
    """Sizes or names of grid axes that do not fit the ranks, the mode or one another."""


class LayoutError(ColossalError, ValueError):
    """A layout that does not fit its array or its grid."""


class ShapeError(ColossalError, ValueError):
    """Shapes that do not fit one another."""


class OptionError(ColossalError, ValueError):
    """An option that has no such value, or none for these arguments."""


class IndexingError(ColossalError, IndexError):
    """An index that does not fit its array, or that a distributed array cannot take."""


class SingularError(ColossalError, ArithmeticError):
    """A matrix whose columns are not independent enough for the factorization or solution asked for."""


class DTypeError(ColossalError, TypeError):
    """Dtypes that do not fit one another or that MPI cannot carry."""


class SharingError(ColossalError, BufferError):
    """Memory that two array libraries cannot share."""


class ConfigError(ColossalError, ValueError):
    """A configuration that cannot be run."""


class ScheduleError(ColossalError, ValueError):
    """A pipeline schedule that would compute something wrong, or nothing for ever."""


class CheckpointError(ColossalError, RuntimeError):
    """A checkpoint that is missing, damaged or of another kind."""


class LaunchError(ColossalError, ImportError):
    """MPI is missing, or the launcher and the MPI library do not belong together."""


class VerificationError(ColossalError, ArithmeticError):
    """A result that fails a check of itself."""
