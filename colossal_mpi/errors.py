"""The errors that users see.

Every module raises them. An error says which value was required, which was given and which would work. It is raised
from *global* metadata, so that every rank raises the same one. An error that one rank alone can see (a token id out of
range) is raised there, and ends the job unless it is caught. Start-up code prints such an error once, without a
traceback.
"""


class ColossalError(Exception):
    """Base of every error that colossal_mpi raises on purpose."""


class GridError(ColossalError, ValueError):
    """The sizes or names of grid axes do not fit the ranks, the tensor mode or one another."""


class LayoutError(ColossalError, ValueError):
    """A layout does not fit its array or its grid."""


class ShapeError(ColossalError, ValueError):
    """Shapes do not fit one another."""


class OptionError(ColossalError, ValueError):
    """An option has no such value, or no such value for these arguments."""


class IndexingError(ColossalError, IndexError):
    """An index does not fit its array, or is of a kind that a distributed array does not take."""


class SingularError(ColossalError, ArithmeticError):
    """The columns of a matrix are not independent enough for the factorization or the solution."""


class DTypeError(ColossalError, TypeError):
    """Dtypes do not fit one another, or MPI cannot carry one."""


class SharingError(ColossalError, BufferError):
    """Two array libraries cannot share a block of memory."""


class ConfigError(ColossalError, ValueError):
    """A configuration cannot be run."""


class ScheduleError(ColossalError, ValueError):
    """A pipeline schedule would compute something wrong, or would never end."""


class CheckpointError(ColossalError, RuntimeError):
    """A checkpoint is missing, damaged or of another kind."""


class LaunchError(ColossalError, ImportError):
    """MPI is missing, or the launcher and the MPI library do not belong together."""


class MismatchError(ColossalError, RuntimeError):
    """Ranks of a group make different calls, or hold different values of what must be equal."""


class VerificationError(ColossalError, ArithmeticError):
    """A result fails its check."""


class NonFiniteError(ColossalError, ArithmeticError):
    """A loss, a gradient, a weight or an optimizer's state is NaN or infinite; raised before weights are updated.

    Parameters
    ----------
    text : str
        What is not finite, and where it begins.
    state : bool
        Whether it is in a weight or in the state of the optimizer, which leaving out a step cannot mend.
    repeats : bool
        Whether it came again when the step was done a second time.
    """

    def __init__(self, text: str, state: bool = False, repeats: bool = False) -> None:
        super().__init__(text)
        self.state, self.repeats = state, repeats
